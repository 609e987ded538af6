"""The house of the package: what may import what, how long a file may be, what `import fluvial` costs.

Every module has a rank and imports only from rooms of lower rank, so that the core can be read, and used,
without what is built on it. The imports are read with `ast`; only the last two tests execute any.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# A room is a module directly under fluvial, or a folder there with all that is in it.
RANKS = {
    "errors": 0, "random": 0,
    "paths": 1, "grids": 1, "couplings": 1, "brownian": 1,
    "predictions": 2,
    "convention": 2.5,
    "model": 3, "flow_maps": 3.5,
    "exact": 4, "guidance": 4, "inputs": 4, "objectives": 4, "solvers": 4,
    "plans": 4.5, "running": 4.7, "adaptive": 4.8,
    "sampling": 5, "mcmc": 5, "likelihood": 5.2, "captured": 5.2, "testing": 5.5, "fitting": 5.5,
    "embeddings": 5.9,
    "measure": 6, "networks": 6, "sheets": 6,
    "training": 7,
    "straighten": 8, "distill": 8, "systems": 8,
    "interop": 9,
    "show": 10,
    "cli": 11,
}  # fmt: skip
CORE = 4  # Up to this rank, torch and the standard library only.
LIGHT_ROOMS = {"interop": {"torch", "numpy"}, "show": {"torch", "numpy"}}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve"}
HEAVY = ("diffusers", "transformers", "matplotlib", "scipy", "sklearn", "accelerate", "typer", "rich", "PIL")
FILE_LIMIT, FUNCTION_LIMIT = 350, 70

Sources = dict[str, str]


class Import(NamedTuple):
    """One imported module: where from, and whether it happens as the importing module loads."""

    module: str
    line: int
    on_load: bool


# Reading


def read_sources(root: Path) -> Sources:
    """Every file of the package: dotted module name -> text. A folder's `__init__` goes by that name."""
    files = sorted((root / "fluvial").rglob("*.py"))
    return {".".join(f.relative_to(root).with_suffix("").parts): f.read_text("utf-8") for f in files}


def room(module: str) -> str:
    """`fluvial.solvers.rows` -> `solvers`."""
    return module.split(".")[1]


def resolve(module: str, sources: Sources) -> str:
    """A dotted name as a key of `sources`: a package's is its `__init__`, other names are their own."""
    return f"{module}.__init__" if f"{module}.__init__" in sources else module


def imports(name: str, sources: Sources) -> Iterator[Import]:
    """What a module imports, with relative names made absolute, at any depth of the file."""

    def walk(node: ast.AST, on_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(resolve(a.name, sources), child.lineno, on_load) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = name.split(".")[: -child.level] if child.level else []
                base = ".".join([*package, *([child.module] if child.module else [])])
                for alias in child.names:
                    inner = resolve(f"{base}.{alias.name}", sources)
                    # `from fluvial import paths` means a module, `from fluvial.paths import VP` a name.
                    target = inner if inner in sources else resolve(base, sources)
                    if target == "fluvial.__init__" and alias.name == "__version__":
                        continue
                    yield Import(target, child.lineno, on_load)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, on_load and not function and not types_only)

    yield from walk(ast.parse(sources[name]), True)


def where(name: str, line: int) -> str:
    return f"src/{name.replace('.', '/')}.py:{line}"


# The rules: each yields one line per breach


def unplaced(sources: Sources) -> Iterator[str]:
    for name in sources:
        if name != "fluvial.__init__" and room(name) not in RANKS:
            yield f"{where(name, 1)}: no rank is known for {room(name)!r}; give it one in RANKS"


def upward_imports(sources: Sources) -> Iterator[str]:
    for name in sources:
        for found in imports(name, sources):
            if found.module.split(".")[0] != "fluvial":
                continue
            here = where(name, found.line)
            if name == "fluvial.__init__":
                if found.on_load:
                    yield f"{here}: imports {found.module} as the package loads; expected inside __getattr__"
            elif found.module == "fluvial.__init__":
                yield f"{here}: imports the package itself; expected the module where the name lives"
            elif room(name) != room(found.module) and room(name) in RANKS:
                mine, theirs = RANKS[room(name)], RANKS.get(room(found.module))
                if theirs is None or theirs >= mine:
                    yield f"{here}: rank {mine} imports {found.module}, rank {theirs}; expected a lower one"


def cycles(sources: Sources) -> Iterator[str]:
    """Within a folder siblings may import each other, but not in a circle."""
    graph = {
        name: {i.module for i in imports(name, sources) if i.module in sources and i.module != name}
        for name in sources
        if name != "fluvial.__init__"
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "a circle of imports: " + " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                yield from visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def heavy_imports(sources: Sources) -> Iterator[str]:
    for name in sources:
        rank = -1 if name == "fluvial.__init__" else RANKS.get(room(name), CORE)
        allowed = {"torch"} if rank <= CORE else LIGHT_ROOMS.get(room(name))
        if allowed is None:
            continue
        allowed = {*allowed, "fluvial", *sys.stdlib_module_names}
        for found in imports(name, sources):
            top = found.module.split(".")[0]
            if found.on_load and top not in allowed:
                yield f"{where(name, found.line)}: imports {top} as it loads; expected inside a function"


def pickles(sources: Sources) -> Iterator[str]:
    for name, text in sources.items():
        for found in imports(name, sources):
            if found.module.split(".")[0] in PICKLES:
                yield f"{where(name, found.line)}: imports {found.module}; expected safetensors and JSON"
        # torch.save writes a pickle and torch.load reads one, which only others' checkpoints need.
        forbidden = {"torch.save"} if room(name) == "interop" else {"torch.save", "torch.load"}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and (call := ast.unparse(node)) in forbidden:
                yield f"{where(name, node.lineno)}: {call} is pickle; expected safetensors and JSON"


def long_files(sources: Sources) -> Iterator[str]:
    for name, text in sources.items():
        lines = len(text.splitlines())
        if lines > FILE_LIMIT:
            yield f"{where(name, lines)}: {lines} lines; expected at most {FILE_LIMIT}"


def long_functions(sources: Sources) -> Iterator[str]:
    """The docstring is not counted: nobody should save on it."""
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            lines = node.end_lineno - node.lineno + 1
            lines -= first.end_lineno - first.lineno + 1 if documented else 0
            if lines > FUNCTION_LIMIT:
                here = where(name, node.lineno)
                yield f"{here}: {node.name} is {lines} lines; expected {FUNCTION_LIMIT} or fewer"


RULES = [unplaced, upward_imports, cycles, heavy_imports, pickles, long_files, long_functions]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    breaches = list(rule(read_sources(SOURCE)))
    assert not breaches, "\n" + "\n".join(breaches)


# Each rule notices the breach it is there for, and does not cry wolf.


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (unplaced, {"fluvial.helpers": ""}),
        (upward_imports, {"fluvial.paths": "from fluvial.model import Model", "fluvial.model": ""}),
        (upward_imports, {"fluvial.paths": "from fluvial import grids", "fluvial.grids": ""}),
        (upward_imports, {"fluvial.paths": "def f():\n    from . import model", "fluvial.model": ""}),
        (upward_imports, {"fluvial.cli": "import fluvial as fl", "fluvial.__init__": ""}),
        (upward_imports, {"fluvial.__init__": "from fluvial.paths import VP", "fluvial.paths": ""}),
        (
            cycles,
            {"fluvial.training.a": "from . import b", "fluvial.training.b": "from fluvial.training import a"},
        ),
        (
            cycles,
            {
                "fluvial.training.__init__": "from .a import f",
                "fluvial.training.a": "import fluvial.training",
            },
        ),
        (heavy_imports, {"fluvial.couplings": "import scipy.optimize"}),
        (heavy_imports, {"fluvial.grids": "import numpy as np"}),
        (heavy_imports, {"fluvial.show.plots": "try:\n    import matplotlib\nexcept ImportError:\n    pass"}),
        (heavy_imports, {"fluvial.interop.hub": "from huggingface_hub import hf_hub_download"}),
        (pickles, {"fluvial.training.checkpoints": "def f():\n    import pickle"}),
        (pickles, {"fluvial.training.checkpoints": "import torch\ntorch.save({}, 'a.pt')"}),
        (long_files, {"fluvial.cli": "\n" * (FILE_LIMIT + 1)}),
        (long_functions, {"fluvial.cli": "def f():\n" + "    pass\n" * FUNCTION_LIMIT}),
    ],
)
def test_rule_notices(rule, sources):
    assert len(list(rule(sources))) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_what_is_allowed(rule):
    sources = {
        "fluvial.__init__": "def __getattr__(name):\n    import fluvial.paths",
        "fluvial.paths": "import math\nimport torch\nfrom fluvial.errors import OptionError",
        "fluvial.errors": "",
        "fluvial.couplings": "def f():\n    from scipy.optimize import linear_sum_assignment",
        "fluvial.training.__init__": "from fluvial.training.trainer import train",
        "fluvial.training.trainer": "import accelerate\nfrom . import ema\nfrom .. import __version__",
        "fluvial.training.ema": "from fluvial import paths",
        "fluvial.interop.edm": "import numpy\nimport torch\ndef f():\n    return torch.load('a.pt')",
        "fluvial.cli": "import typer\nfrom fluvial.training import train",
        "fluvial.show.plots": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib",
        "fluvial.likelihood": 'def f():\n    """' + "\n" * FUNCTION_LIMIT + '"""',
    }
    assert list(rule(sources)) == []


# What an import costs.


def heavy_after(statements: str) -> list[str]:
    """Which of `HEAVY` a fresh interpreter has loaded after these statements."""
    code = f"{statements}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_is_light():
    assert heavy_after("import fluvial") == []


def test_importing_the_core_is_light():
    core = [n for n in read_sources(SOURCE) if n != "fluvial.__init__" and RANKS.get(room(n), 99) <= CORE]
    assert heavy_after("\n".join(f"import {name.removesuffix('.__init__')}" for name in core)) == []
