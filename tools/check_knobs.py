"""Checks that docs/knobs.md is the table of swarm_core.config; with --write, makes it so."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tree this script lies in, whatever is installed

from swarm_core.config import knob_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=ROOT / "docs" / "knobs.md", help="the page")
    parser.add_argument("--write", action="store_true", help="write the page instead of comparing it")
    arguments = parser.parse_args()
    page, wanted = arguments.file, knob_table()
    if arguments.write:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(wanted, encoding="utf-8")
        sys.stdout.write(f"wrote {page}\n")
        return 0
    found = page.read_text(encoding="utf-8") if page.exists() else ""
    if found == wanted:
        sys.stdout.write("knobs: the page is the table\n")
        return 0
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), str(page), "swarm_core.config", "", "", 0, "")
    sys.stdout.write("\n".join(lines) + "\nknobs: run `make knobs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
