"""The plan of a run before it starts (`--dry-run`): what can be checked, stages, bytes a tick, memory. Loads no weights."""

from __future__ import annotations

import heapq
import json
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from anchor_node.corrector import pair_bytes
from anchor_node.record import byte_text
from anchor_node.serve import prepare, trace_of
from codec.corrections import largest_bytes
from codec.spec import Direction, dense_bytes, packet_bytes
from swarm_core.config import RunConfig
from swarm_core.data.dataset import Row, load_rows
from swarm_core.data.prompts import encode_prompt
from swarm_core.errors import KedgeError, UserError
from swarm_core.learning.latency import FireSchedule
from swarm_core.learning.partition import stage_flops
from swarm_core.learning.replay_ring import MIB, ReplayRing
from swarm_core.learning.rewards import resolve as resolve_reward
from swarm_core.manifest import Manifest
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import load_tokenizer, tensor_shapes
from swarm_core.wire.corrections import correction_spec

SHARD_BYTES = 12  # a parameter in a checkpoint, fp32: weight, two moments
STATE_BYTES = 16  # a parameter in fp32: weight, gradient, two moments
LONGEST_ROWS = 256  # prompts that are tokenized to find the longest; letters and tokens rank nearly alike


def print_plan(config: RunConfig) -> None:
    """Validate everything a run needs and print what it would do. Raises what serving would raise."""
    manifest, path = prepare(config)
    rows = load_rows(config.data.train)
    validation = load_rows(config.data.validation) if config.data.validation else []
    shape = read_shape(path)
    longest = _check(config, path, rows + validation)
    console = Console()
    console.print(
        f"run [bold]{config.run.name}[/]  manifest {manifest.digest()[:12]}  {len(rows)} rows, {len(validation)} to validate"
    )
    here = (
        "" if config.run.device == "cpu" else f", {'cuda' if torch.cuda.is_available() else 'no GPU'} on this machine"
    )
    limit = config.grpo.max_completion_length
    source = config.sampler.replay or f"reward {config.data.reward}"
    console.print(
        f"checked: model, tokenizer, {source}; the longest prompt has {longest} tokens, {limit} more may follow; "
        f"device {config.run.device}{here}"
    )
    largest = 0
    table = Table("stage", "layers", "parameters", "weights + optimizer", "share of FLOPs")
    total = sum(stage_flops(shape, span) for span in manifest.spans)
    for span in manifest.spans:
        parameters = sum(math.prod(dims) for dims in tensor_shapes(shape, span).values())
        largest = max(largest, parameters)
        table.add_row(
            str(span.stage),
            f"{span.first_layer} to {span.last_layer - 1}",
            f"{parameters / 1e6:.2f} M",
            byte_text(parameters * STATE_BYTES),
            f"{stage_flops(shape, span) / total:.0%}",
        )
    console.print(table)
    if (fires := manifest.fires(trace_of(config))) is not None:
        _print_corrections(console, config, manifest, path, fires)
    if manifest.boundaries == 0:
        return
    g, link = config.grpo, manifest.link()
    sequences = g.prompts_per_batch * g.completions_per_prompt // g.ticks_per_pass
    tokens = sequences * (longest + g.max_completion_length)
    forward, backward = packet_bytes(link, Direction.FORWARD, tokens), packet_bytes(link, Direction.BACKWARD, tokens)
    dense = 2 * dense_bytes(link.width, tokens)
    console.print(
        f"one tick, one link, {tokens:,} tokens at most, prompts included, outliers apart: at most {byte_text(forward)} down, "
        f"{byte_text(backward)} up, {(forward + backward) / dense:.1%} of dense bf16"
    )
    if link.kind == "lowrank" and "uniform" in (link.quantiser_forward, link.quantiser_backward):
        console.print(
            "packed coefficients, shared prompts and reuse deltas make it many times less: see benchmarks/codec.md"
        )
    if g.ticks_per_pass * g.max_reuse > 1:
        console.print(
            f"before its first tick a batch crosses once more, down only (score pass): "
            f"{byte_text(forward * g.ticks_per_pass)} at most"
        )
    if config.checkpoint.off_host:
        often = f"every {config.checkpoint.every} ticks" if config.checkpoint.every else "at the end"
        console.print(
            f"a stage on a host of its own sends what it receives once more to the anchor, at most "
            f"{byte_text(forward + backward)} a tick, and its shard, up to {byte_text(largest * SHARD_BYTES)}, {often}"
        )
    for mbps in (50, 100, 500):
        seconds = max(forward, backward) * 8 / mbps / 1e6
        console.print(f"  at {mbps} Mbit/s the larger direction takes {seconds:.2f} s a tick")


def _print_corrections(
    console: Console, config: RunConfig, manifest: Manifest, path: Path, fires: FireSchedule
) -> None:
    """What the slow circuit ships, and what the anchor keeps. Raises LearningError for a ring that is too small."""
    shape, pair = read_shape(path), pair_bytes(manifest, path)
    ReplayRing(fires, manifest.stages, config.anchor.ring_mb * MIB).check(pair)
    spec = correction_spec(config)
    parts = [list(tensor_shapes(shape, span).values()) for span in manifest.spans]
    packets = sum(largest_bytes(spec, shapes) for shapes in parts)
    console.print(
        f"corrections: every {config.anchor.m_cadence} ticks at most {byte_text(pair)} of weights and rollouts to the anchor, "
        f"{byte_text(packets)} back ({spec.form}); it keeps up to {fires.most_pairs()} pairs on disk, "
        f"{byte_text(fires.most_pairs() * pair)}"
    )


def _check(config: RunConfig, path: Path, rows: list[Row]) -> int:
    """What would fail only once workers compute. Returns the longest prompt, in tokens; raises UserErrors."""
    tokenizer = load_tokenizer(path)
    longest_rows = heapq.nlargest(LONGEST_ROWS, rows, key=lambda row: len(str(row.prompt)))
    longest = max(len(encode_prompt(tokenizer, row.prompt, config.data.chat_template)) for row in longest_rows)
    completion, room = config.grpo.max_completion_length, read_shape(path).max_positions
    if longest + completion > room:
        raise UserError(
            f"the longest prompt has {longest} tokens and grpo.max_completion_length is {completion}, but the model "
            f"reads {room} tokens (max_position_embeddings): shorten one of them"
        )
    if config.sampler.replay is not None:
        _check_recording(config.sampler.replay)
        return longest
    try:
        resolve_reward(config.data.reward)
    except KedgeError:
        raise
    except Exception as error:  # noqa: BLE001 - importing runs the user's code
        raise UserError(
            f"data.reward {config.data.reward} cannot be imported ({type(error).__name__}: {error})"
        ) from None
    return longest


def _check_recording(file: Path) -> None:
    """Whether a recording is there and begins like one; the sampler checks every line as it reads it."""
    if not file.exists() or file.is_dir():
        raise UserError(f"sampler.replay {file}: no such file; give the .jsonl file of recorded rollouts")
    if not file.is_file():
        return  # a pipe is read once
    with file.open(errors="replace") as lines:
        first = lines.readline()
    try:
        names = set(json.loads(first))
    except (ValueError, TypeError):
        names = set()
    if not {"batch", "prompt_ids", "completion_ids"} <= names:
        raise UserError(f"sampler.replay {file}: its first line is no recorded rollout; wanted prompt_ids and so on")
