"""Hostile frames of every kind against the real readers: typed refusals only, and memory stays where it was.

`make test` runs a few thousand; `make test-faults` runs 100,000 (KEDGE_FRAMES). KEDGE_SEED repeats a run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from frame_corpus import Corpus, Specimen
from frame_mutator import Mutator
from frame_readers import TYPED, Readers, Untyped, peak_bytes

from swarm_core.wire.frames import chunks_of
from swarm_core.wire.messages import FrameKind

FRAMES = int(os.environ.get("KEDGE_FRAMES", "3000"))
SEED = int(os.environ.get("KEDGE_SEED", "20"))
MOST_GROWTH_BYTES = 64 << 20
WARM_UP = 300  # frames after which imports, caches and allocators have taken what they take
TRIM_EVERY = 5000  # frames: what the C library keeps of freed memory, split by many threads, is no growth of ours
LARGE_BYTES = 1 << 16  # frames above it are drawn ten times less often: they take as long as ten others


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    torch.set_num_threads(1)
    return Corpus()


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Readers]:
    made = Readers(tmp_path)
    yield made
    made.close()


def test_every_kind_of_frame_has_a_specimen_that_its_reader_takes(corpus: Corpus, readers: Readers) -> None:
    assert corpus.kinds == set(FrameKind)
    for specimen in corpus.specimens:
        readers.take(specimen.to, chunks_of(specimen.frame))
    assert readers.accepted == len(corpus.specimens)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux' own counters")
def test_only_typed_refusals_and_no_growth(corpus: Corpus, readers: Readers) -> None:
    mutator = Mutator(SEED, [s.frame for s in corpus.specimens])
    weights = [0.1 if len(s.frame.payload) > LARGE_BYTES else 1.0 for s in corpus.specimens]
    outcomes: Counter[str] = Counter()
    untyped: list[str] = []
    warned: set[str] = set()
    start = most = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for number in range(WARM_UP + FRAMES):
            if (number - WARM_UP) % TRIM_EVERY == 0:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
            if number == WARM_UP:
                start, most = peak_bytes(reset=True), 0
            specimen: Specimen = mutator.random.choices(corpus.specimens, weights)[0]
            chunks = mutator.messages(specimen.frame, specimen.message)
            peak_bytes(reset=True)  # what it took to make the frame is not the reader's
            outcomes[_outcome(readers, specimen, chunks, number, untyped)] += 1
            most = max(most, peak_bytes())
            warned |= {f"{each.filename}:{each.lineno}: {each.message}" for each in caught}
            caught.clear()
    growth = most - start
    print(f"seed {SEED}: {FRAMES} frames, peak growth {growth >> 20} MiB, {dict(outcomes.most_common())}")
    assert not untyped, f"seed {SEED}: {len(untyped)} untyped, the first: {untyped[:5]}"
    assert growth <= MOST_GROWTH_BYTES, f"seed {SEED}: {growth >> 20} MiB more than after the warm-up"
    refused = sum(outcomes.values()) - outcomes["taken"]
    assert refused > 0.5 * FRAMES and outcomes["taken"] > 0.02 * FRAMES, "the mutator only makes noise, or nothing"
    assert {"BadFrame", "PacketError", "CorrectionRefused", "ProtocolError"} <= set(outcomes), (
        "readers behind are not reached"
    )
    assert not warned, f"seed {SEED}: warned where a peer should be refused"


def _outcome(readers: Readers, specimen: Specimen, chunks: list[bytes], number: int, untyped: list[str]) -> str:
    try:
        readers.take(specimen.to, chunks)
    except TYPED as error:
        assert "\n" not in str(error)[:2000], f"seed {SEED}, frame {number}: a refusal of several lines: {error}"
        return type(error).__name__
    except Untyped as error:
        untyped.append(f"frame {number}, {specimen.name}: {error}")
        return "untyped"
    return "taken"


def test_a_reader_that_raises_what_nobody_translates_is_found(corpus: Corpus, readers: Readers) -> None:
    def broken(_chunks: list[bytes]) -> None:
        raise KeyError("message")

    readers._zero.vote = broken  # type: ignore[method-assign]
    vote = next(s for s in corpus.specimens if s.frame.header.kind is FrameKind.VOTE)
    with pytest.raises(Untyped, match="KeyError"):
        readers.take(vote.to, chunks_of(vote.frame))
