"""zstd is measured on the stream: kept while it saves, rested while it does not, tried again; the same every time."""

import random

from codec.zstd_auto import REST_PACKETS, WINDOW_PACKETS, ZstdAuto

PAYS = memoryview(bytes(range(16)) * 64)


def noise(seed: int, size: int = 1024) -> memoryview:
    return memoryview(random.Random(seed).randbytes(size))


def test_stays_on_while_it_saves() -> None:
    auto = ZstdAuto()
    for _ in range(4 * WINDOW_PACKETS):
        frame = auto.shrink(PAYS)
        assert frame is not None and len(frame) < len(PAYS)


def test_rests_when_it_does_not_save_and_is_tried_again() -> None:
    auto = ZstdAuto()
    assert all(auto.shrink(noise(seed)) is None for seed in range(WINDOW_PACKETS))
    assert all(auto.shrink(PAYS) is None for _ in range(REST_PACKETS))
    assert all(auto.shrink(PAYS) is not None for _ in range(3 * WINDOW_PACKETS))


def test_a_saving_below_three_per_cent_does_not_pay() -> None:
    """Each such packet is still sent smaller while the window is open; then zstd rests."""
    auto = ZstdAuto()
    slightly = [memoryview(bytes(noise(seed, 4000)) + bytes(90)) for seed in range(WINDOW_PACKETS)]
    frames = [auto.shrink(raw) for raw in slightly]
    assert all(frame is not None and 0.97 * len(raw) < len(frame) for raw, frame in zip(slightly, frames, strict=True))
    assert auto.shrink(PAYS) is None


def test_one_odd_packet_does_not_flip_the_decision() -> None:
    auto = ZstdAuto()
    for index in range(3 * WINDOW_PACKETS):
        frame = auto.shrink(noise(index) if index % WINDOW_PACKETS == 3 else PAYS)
        assert (frame is None) == (index % WINDOW_PACKETS == 3)


def test_empty_payloads_are_not_evidence() -> None:
    auto = ZstdAuto()
    for _ in range(2 * WINDOW_PACKETS):
        assert auto.shrink(memoryview(b"")) is None
    assert auto.shrink(PAYS) is not None


def test_the_same_stream_gives_the_same_frames() -> None:
    choose = random.Random(5)
    stream = [noise(i) if choose.random() < 0.5 else PAYS for i in range(3 * REST_PACKETS)]
    first, second = ZstdAuto(), ZstdAuto()
    assert [first.shrink(raw) for raw in stream] == [second.shrink(raw) for raw in stream]
