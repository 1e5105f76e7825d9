"""The allocator setting acts in the process that asks for it: a freed large block stays mapped."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
import sys
from swarm_core.wire.allocator import keep_large_blocks

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_large_blocks()
block = bytes(b"x") * (48 << 20)
del block
print(resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_block_stays_mapped_only_when_asked() -> None:
    def resident(choice: str) -> int:
        command = [sys.executable, "-c", PROBE, choice]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert resident("keep") - resident("leave") > 40 << 20
