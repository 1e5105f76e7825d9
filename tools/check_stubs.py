"""Checks that the generated files in proto/ are what their .proto files give, byte for byte. Changes nothing."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from make_stubs import ROOT, generate


def differences(proto: Path) -> list[str]:
    """One line for each stub that is missing, stale or has no source."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {path: (Path(folder) / path).read_bytes() for path in generate(proto, Path(folder))}
    found = {path.relative_to(proto) for end in ("py", "pyi") for path in proto.rglob(f"*_pb2.{end}")}
    lines = [f"missing: {path}" for path in sorted(set(fresh) - found)]
    lines += [f"no source: {path}" for path in sorted(found - set(fresh))]
    return lines + [
        f"stale: {path}" for path in sorted(found & set(fresh)) if (proto / path).read_bytes() != fresh[path]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proto", type=Path, default=ROOT / "proto", help="folder of the .proto files")
    lines = differences(parser.parse_args().proto)
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.write("stubs: run `make stubs`\n" if lines else "stubs: as generated\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
