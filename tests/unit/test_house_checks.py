"""The house checks must be able to fail: each is run on a small repository with one thing wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["Makefile", "codec/__init__.py", "codec/basis.py", "core/wire/a.py", ".ci/run"]
TREE = """# Title

<!-- tree -->
```text
Makefile      every command
codec/        tensor <-> bytes
  basis.py    the projection
core/         what both stand on
  wire/       channels
.ci/          what runs before a change lands
  run         checks and tests
README.md     start here
```
"""
BOXES = """<!-- tree -->
```
├── Makefile      # every command
├── codec/        # tensor <-> bytes
│   └── basis.py  # the projection
├── core/         # what both stand on
│   └── wire/     # channels
├── .ci/          # what runs before a change lands
│   └── run       # checks and tests
└── README.md     # start here
```
"""


def tool(name: str, *arguments: str | Path) -> tuple[int, str]:
    """Runs tools/`name`; returns its exit status and what it said."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "README.md").write_text(TREE)
    (tmp_path / "untracked.txt").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "README.md", *FILES], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize("readme", [TREE, BOXES])
def test_a_tree_that_fits(repository: Path, readme: str) -> None:
    (repository / "README.md").write_text(readme)
    assert tool("check_tree.py", "--root", repository) == (0, "tree: README.md names what git tracks\n")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  basis.py    the projection\n", "", "+ codec/basis.py\n"),
        ("  wire/       channels\n", "  wire/       channels\n  gone.py     nothing\n", "- core/gone.py\n"),
        ("  wire/       channels\n", "  wire        channels\n", "+ core/wire/\n- core/wire\n"),
        ("Makefile      every command\n", "Makefile\n", "Makefile: wants a description"),
        ("every command", "word " * 13, "Makefile: wants a description"),
        ("README.md     start here\n", "README.md     start here\nREADME.md     again\n", "README.md: named twice"),
        ("  wire/       channels\n", "  wire/       channels\n    a.py      too deep\n", "a.py: neither"),
        ("<!-- tree -->", "", "no fenced block"),
    ],
)
def test_a_tree_that_does_not(repository: Path, old: str, new: str, says: str) -> None:
    (repository / "README.md").write_text(TREE.replace(old, new))
    status, said = tool("check_tree.py", "--root", repository)
    assert status == 1
    assert says in said


def test_no_readme_and_no_repository_are_said_readably(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (repository / "README.md").unlink()
    assert "there is no" in tool("check_tree.py", "--root", repository)[1]
    bare = tmp_path_factory.mktemp("bare")
    (bare / "README.md").write_text(TREE)
    status, said = tool("check_tree.py", "--root", bare)
    assert status == 1
    assert "git ls-files failed" in said


def test_the_knob_page_is_fresh_and_a_stale_one_is_noticed(tmp_path: Path) -> None:
    assert tool("check_knobs.py")[0] == 0
    page = tmp_path / "docs" / "knobs.md"
    assert tool("check_knobs.py", "--file", page)[0] == 1
    assert tool("check_knobs.py", "--file", page, "--write")[0] == 0
    assert tool("check_knobs.py", "--file", page)[0] == 0
    page.write_text(page.read_text().replace("| `window` | `20` |", "| `window` | `21` |"))
    status, said = tool("check_knobs.py", "--file", page)
    assert status == 1
    assert "-| `window` | `21` |" in said and "+| `window` | `20` |" in said


def test_the_stubs_are_fresh_and_stale_ones_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    assert tool("check_stubs.py") == (0, "stubs: as generated\n")
    proto = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", proto, ignore=shutil.ignore_patterns("__pycache__"))
    source, stub = next(proto.rglob("*.proto")), next(proto.rglob("*_pb2.py"))
    with source.open("a") as file:
        file.write("message AddedByATest { uint32 x = 1; }\n")
    status, said = tool("check_stubs.py", "--proto", proto)
    assert status == 1
    assert f"stale: {stub.relative_to(proto)}" in said and "stale: " + str(stub.relative_to(proto)) + "i" in said
    assert tool("make_stubs.py", "--proto", proto)[0] == 0
    assert tool("check_stubs.py", "--proto", proto)[0] == 0
    stub.unlink()
    (stub.parent / "left_pb2.py").write_text("")
    said = tool("check_stubs.py", "--proto", proto)[1]
    assert f"missing: {stub.relative_to(proto)}" in said and "no source: " in said
    status, said = tool("check_stubs.py", "--proto", tmp_path / "empty")
    assert status == 1
    assert "no .proto file" in said


ROOMS = ["anchor_node", "swarm_worker", "swarm_core", "codec", "swarm_core/wire", "swarm_core/learning"]
MODULES = {
    "anchor_node/service.py": "import swarm_core.wire.frames",
    "swarm_worker/service.py": "import swarm_core.wire.frames",
    "swarm_worker/compute.py": "import codec.basis",
    "swarm_core/wire/frames.py": "import socket, swarm_proto.v1.swarm_pb2, swarm_core.learning.stage",
    "swarm_core/learning/stage.py": "import codec.basis, swarm_core.models.reading",
    "swarm_core/models/__init__.py": "",
    "swarm_core/models/reading.py": "import os, swarm_core.learning.stage",
    "swarm_core/data/__init__.py": "import swarm_core.learning.stage",
    "swarm_core/errors.py": "",
    "swarm_core/run_folder.py": "",
    "swarm_core/durable.py": "",
    "swarm_core/exits.py": "import swarm_core.errors",
    "swarm_core/manifest.py": "import swarm_core.config",
    "swarm_core/knobs.py": "import pydantic",
    "swarm_core/config.py": "import swarm_core.knobs",
    "codec/basis.py": "import torch",
    "proto/swarm_proto/__init__.py": "",
    "proto/swarm_proto/v1/__init__.py": "",
    "proto/swarm_proto/v1/swarm_pb2.py": "import google.protobuf",
}


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("codec/basis.py", "import torch", None),
        ("anchor_node/service.py", "import swarm_worker.compute", "two programs"),
        ("swarm_core/learning/stage.py", "import time", "learning is pure"),
        ("swarm_core/models/reading.py", "import swarm_proto.v1.swarm_pb2", "sees generated messages"),
        ("swarm_core/config.py", "import torch", "without torch"),
        ("swarm_core/common.py", "", "inside swarm_core"),
    ],
)
def test_a_wall_between_rooms_holds(tmp_path: Path, module: str, line: str, broken: str | None) -> None:
    pytest.importorskip("importlinter")
    files = {f"{room}/__init__.py": "" for room in ROOMS} | MODULES
    files[module] = files.get(module, "") + f"\n{line}\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-logo', '--no-cache'])"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'proto'}", "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    lines = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    if broken is None:
        assert (done.returncode, lines) == (0, []), done.stdout + done.stderr
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert any(broken in line for line in lines), done.stdout
