"""No byte from a peer can become code: nothing in the house unpickles, evaluates or loads yaml, seen on the syntax trees.

All four packages are walked, and not only what a frame reaches today: what is one import away now is called tomorrow.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("codec", "swarm_core", "swarm_worker", "anchor_node", "proto/swarm_proto")

# Modules whose import alone is refused: they exist to turn bytes into objects of any class, or text into code.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "yaml", "ruamel",
    "oyaml", "code", "codeop", "xmlrpc", "hickle", "pandas",
}  # fmt: skip
# Built in, by their bare names; and `compile`, the half of eval that comes first.
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Calls by the end of their dotted name.
CALLS = {
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.load",
    "torch.export.load", "numpy.load", "numpy.fromfile", "builtins.eval", "builtins.exec", "os.system", "os.popen",
    "importlib.import_module", "runpy.run_path", "runpy.run_module", "types.FunctionType", "types.CodeType",
    "multiprocessing.connection.Client", "multiprocessing.connection.Listener", "msgpack.unpackb", "msgpack.Unpacker",
}  # fmt: skip
# Arguments that open the door wherever they stand.
ARGUMENTS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}

# file -> what it may do, and why that is no byte from the wire.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("swarm_core/learning/rewards.py", "importlib.import_module"): (
        "data.reward = package.module:function is an operator's own code, installed beside a sampler; importing it is the "
        "feature. The name is in the manifest, so a sampler trusts its anchor with it (docs/operations.md says so)."
    ),
    ("swarm_worker/redo.py", "msgpack.unpackb"): (
        "a stage's own log on its own disk, a record at a time behind its length and checksum; plain types only"
    ),
    (
        "swarm_core/learning/stage.py",
        "importlib.import_module",
    ): "transformers' module of a family out of a fixed table",
}


def found(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything above in a source text, whatever it was imported as."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # as bound here -> dotted name
    hits: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if alias.name.partition(".")[0] in MODULES:
                    hits.append((node.lineno, f"import {alias.name}"))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if node.module.partition(".")[0] in MODULES:
                hits.append((node.lineno, f"import {node.module}"))
    late = {  # an import that is written out, only later
        id(node.func) for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        and node.args[0].value not in MODULES and _dotted(node.func, names) == "importlib.import_module"
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in late:
            continue
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            dotted = _dotted(node, names)
            if isinstance(node, ast.Name) and dotted in BUILTINS or dotted in CALLS:
                hits.append((node.lineno, dotted))
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            safe = isinstance(node.value, ast.Constant) and node.value.value is not ARGUMENTS[node.arg]
            if not safe:
                hits.append((node.value.lineno, f"{node.arg}={ARGUMENTS[node.arg]}"))
    return sorted(set(hits))


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return "?"


def test_nothing_in_the_house_turns_bytes_into_code() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100, "the walk has lost its way"
    hits = {(str(p.relative_to(ROOT)), what): line for p in files for line, what in found(p.read_text())}
    assert {f"{file}:{line}: {what}" for (file, what), line in hits.items() if (file, what) not in EXCEPTIONS} == set()
    assert set(EXCEPTIONS) <= set(hits), "an exception that nobody needs any more"


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "import yaml.loader",
        "from ruamel.yaml import YAML",
        "import torch\ntorch.load(f, weights_only=True)",
        "import torch as t\nt.load(f)",
        "from torch import load as unpack\nunpack(f)",
        "import torch\nread = torch.load",
        "import numpy as np\nnp.load(f)",
        "import numpy\nnumpy.frombuffer(f)\nsomething(f, allow_pickle=True)",
        "something(f, allow_pickle=flag)",
        "load(f, weights_only=False)",
        "eval(text)",
        "run = exec",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import builtins\nbuiltins.eval(text)",
        "import importlib\nimportlib.import_module(name)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from os import system\nsystem(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import msgpack\nmsgpack.unpackb(data)",
        "import marshal",
        "import importlib\nimportlib.import_module('pickle')",
    ],
)
def test_the_walk_sees(snippet: str) -> None:
    assert found(snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "import re\nre.compile(text)",
        "model.eval()",
        "from safetensors.torch import load\nload(data)",
        "import json\njson.loads(text)",
        "import importlib\nimportlib.import_module('transformers')",
        "f(weights_only=True, allow_pickle=False, shell=False)",
        "# pickle\nx = 'eval(text)'",
        "import numpy\nnumpy.frombuffer(data)",
    ],
)
def test_the_walk_leaves_alone(snippet: str) -> None:
    assert not found(snippet)
