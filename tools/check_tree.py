"""Checks that the tree in README.md names the tracked files, two levels deep, each with a few words. Changes nothing.

The tree is the first fenced block after the line `<!-- tree -->`. A line is a name and what it is; the second level is
indented, folders end in a slash, and the lines of box-drawing characters that some trees have are allowed:

    codec/            tensor <-> bytes
      basis.py        the projection
    Makefile          every command

Empty `__init__.py` files are not listed. A mismatch is printed as `+ name` (tracked, not in the tree) or `- name` (in
the tree, not tracked).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- tree -->"
MOST_WORDS = 12
LINE = re.compile(r"(?P<indent>[\s│├└─]*)(?P<name>\S+)(?:\s+#?\s*(?P<words>.*\S))?\s*")


def tracked(root: Path) -> set[str]:
    """What git tracks, cut to two levels; folders end in a slash."""
    listing = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=root, capture_output=True, text=True)
    if listing.returncode != 0:
        raise SystemExit(f"tree: git ls-files failed in {root}: {listing.stderr.strip()}")
    entries = set()
    for path in filter(None, listing.stdout.split("\0")):
        parts = path.split("/")
        if len(parts) > 1:
            entries.add(parts[0] + "/")
        if parts[-1] != "__init__.py" or len(parts) > 2:
            entries.add("/".join(parts[:2]) + ("/" if len(parts) > 2 else ""))
    return entries


def described(readme: str) -> tuple[set[str], list[str]]:
    """The entries of the README's tree, and what is wrong with its lines."""
    block = re.search(re.escape(MARKER) + r"\s*^```[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        return set(), [f"README.md has no fenced block after {MARKER}"]
    entries: set[str] = set()
    mistakes: list[str] = []
    lines = [LINE.fullmatch(line) for line in block[1].splitlines() if line.strip()]
    margin = min((len(line["indent"]) for line in lines if line), default=0)
    step, folder = 0, ""
    for line in filter(None, lines):
        depth, name = len(line["indent"]) - margin, line["name"]
        if depth and not step:
            step = depth
        if depth not in (0, step) or (depth and not folder.endswith("/")):
            mistakes.append(f"{name}: neither at the margin nor one level below a folder")
            continue
        if depth == 0:
            folder = name
        entry = folder + name if depth else name
        if entry in entries:
            mistakes.append(f"{entry}: named twice")
        entries.add(entry)
        if not 1 <= len((line["words"] or "").split()) <= MOST_WORDS:
            mistakes.append(f"{entry}: wants a description of 1 to {MOST_WORDS} words")
    return entries, mistakes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    root: Path = parser.parse_args().root
    readme = root / "README.md"
    if not readme.exists():
        sys.stdout.write(f"tree: there is no {readme}\n")
        return 1
    entries, lines = described(readme.read_text(encoding="utf-8"))
    files = tracked(root)
    lines += [f"+ {entry}" for entry in sorted(files - entries)]
    lines += [f"- {entry}" for entry in sorted(entries - files)]
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.write("tree: mend the tree in README.md\n" if lines else "tree: README.md names what git tracks\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
