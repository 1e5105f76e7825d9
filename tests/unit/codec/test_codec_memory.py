"""Encoding and decoding need at most the packet plus twice the rows in fp32, as the kernel counts a process' pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import codec

ROWS, WIDTH = 8192, 512
TENSOR_BYTES = 4 * ROWS * WIDTH
PROGRAM = """
import json, sys, torch
from pathlib import Path
from codec.basis import Basis
from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec

rows, width = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def peak(work):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = work()
    return resident("VmHWM") - before, result

for quantiser, rank, outliers, reuse, dtype in json.loads(sys.argv[3]):
    basis = Basis.orthonormal(0, torch.eye(width)[:, :rank], 0.3)
    spec = LinkSpec("lowrank", width, rank, rank, quantiser_forward=quantiser, outliers=outliers, reuse=reuse)
    link, sent, held = LinkCodec(spec), None, None
    x_NH = torch.randn(rows, width).to(getattr(torch, dtype))
    link.decode(link.encode(x_NH[:64], Direction.FORWARD, basis), 64, Direction.FORWARD, basis)  # libraries warm up
    if reuse:
        stores, keys = (ReuseStore(1 << 30), ReuseStore(1 << 30)), [(key, rows // 8) for key in range(8)]
        packet = link.encode(x_NH, Direction.FORWARD, basis, rows=stores[0].rows(keys))
        link.decode(packet, rows, Direction.FORWARD, basis, rows=stores[1].rows(keys))
        for store in stores:
            store.settle(keep=True)
        sent, held = stores[0].rows(keys), stores[1].rows(keys)
        x_NH += 0.05 * torch.randn(rows, width)
    encode_bytes, packet = peak(lambda: link.encode(x_NH, Direction.FORWARD, basis, rows=sent))
    decode_bytes, _ = peak(lambda: link.decode(packet, rows, Direction.FORWARD, basis, rows=held))
    print(json.dumps([encode_bytes, decode_bytes, len(packet)]))
"""
CASES = [
    ["bf16", WIDTH, 0.0, False, "bfloat16"],
    ["int8", WIDTH, 0.0, False, "float32"],
    ["int4", WIDTH, 0.0, False, "bfloat16"],
    ["uniform", WIDTH, 0.0, False, "bfloat16"],
    ["uniform", WIDTH, 1.0, False, "float32"],
    ["uniform", WIDTH // 2, 0.0, True, "float32"],
]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="counts pages as Linux does")
def test_peak_memory_is_the_packet_and_two_tensors() -> None:
    """The widest ranks: all columns, or half of them with references."""
    root = Path(next(iter(codec.__path__))).parent
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    arguments = [sys.executable, "-c", PROGRAM, str(ROWS), str(WIDTH), json.dumps(CASES)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(CASES)
    for case, (encode_bytes, decode_bytes, packet_bytes) in zip(CASES, lines, strict=True):
        assert encode_bytes <= packet_bytes + 2 * TENSOR_BYTES, case
        assert TENSOR_BYTES <= decode_bytes <= packet_bytes + 2 * TENSOR_BYTES, case
