"""Generates the Python stubs of proto/ beside their .proto files. Nothing but protoc's own output is written.

Run it as `make stubs`. The output depends on the version of grpcio-tools, which constraints.txt pins.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def proto_files(proto: Path) -> list[Path]:
    """The .proto files below `proto`, sorted, relative to it."""
    return sorted(path.relative_to(proto) for path in proto.rglob("*.proto"))


def generate(proto: Path, to: Path) -> list[Path]:
    """Writes `_pb2.py` and `_pb2.pyi` of every file below `proto` into `to`; returns their paths relative to `to`."""
    sources = proto_files(proto)
    if not sources:
        raise SystemExit(f"no .proto file below {proto}")
    command = ["protoc", f"-I{proto}", f"--python_out={to}", f"--pyi_out={to}", *map(str, sources)]
    if protoc.main(command) != 0:
        raise SystemExit("protoc refused the files; its messages are above")
    return [source.with_name(source.stem + end) for source in sources for end in ("_pb2.py", "_pb2.pyi")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proto", type=Path, default=ROOT / "proto", help="folder of the .proto files")
    proto: Path = parser.parse_args().proto
    for path in generate(proto, proto):
        sys.stdout.write(f"wrote {proto / path}\n")


if __name__ == "__main__":
    main()
