"""The rules of the house as tests: who may import whom, what a public docstring must say, no path of any machine."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import unifiedar.nn
import unifiedar.ops

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("codes", "attention", "depth", "cache", "sample", "norm", "linear")

# Rooms from the ground up: a file's room, and the rooms of ours that it may import besides its own. Leaves import
# nothing of ours and may be imported by modules and models.
LEAVES = {"unifiedar.checkpoints", "unifiedar.engine", "unifiedar.tokenizer"}
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"ops", "leaf"},
    "models": {"nn", "leaf"},
    "leaf": set(),
    "package": {"ops", "nn", "models", "leaf"},
    "top": {"ops", "nn", "models", "leaf", "package", "bench"},
}


def room_of(module: str) -> str:
    if module in LEAVES:
        return "leaf"
    parts = module.split(".")
    if parts[0] == "bench":
        return "top"
    if len(parts) > 1 and parts[1] in ("kernels", "ops", "nn", "models"):
        return parts[1]
    return "package"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("unifiedar", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute names of every import, at any depth; `from a import b` counts as a.b if that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    return found


MODULES = {module_of(path) for path in sources("unifiedar", "kernels", "bench")}


def ours(name: str) -> bool:
    return name.split(".")[0] in ("unifiedar", "bench", "kernels", "tests")


def broken_rules(module: str, names: set[str]) -> list[str]:
    """What is wrong with a module's imports, one sentence each."""
    room, wrong = room_of(module), []
    for name in sorted(filter(ours, names)):
        target = room_of(name)
        if name.split(".")[0] in ("kernels", "tests"):
            wrong.append(f"{module} imports {name}, which is not installed under that name")
        elif name.split(".")[0] == "bench" and room != "top":
            wrong.append(f"{module} imports {name}: the package knows nothing of its benches")
        elif name == "unifiedar":
            if room in ("kernels", "ops", "nn", "models", "leaf"):
                wrong.append(f"{module} imports the whole package")
        elif target != room and target not in MAY_IMPORT[room]:
            wrong.append(f"{module} ({room}) imports {name} ({target})")
        elif target == room and room in ("kernels", "ops", "nn"):
            family, other = module.split(".")[-1], name.split(".")[-1]
            if family in FAMILIES and other in FAMILIES and family != other:
                wrong.append(f"{module} imports {name}: families never import each other")
        elif room == "leaf" and name != module:
            wrong.append(f"{module} imports {name}: a leaf imports nothing of ours")
    return wrong


@pytest.mark.parametrize("path", sources("unifiedar", "kernels", "bench"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = module_of(path)
    names = imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
    assert not broken_rules(module, names)
    if room_of(module) == "kernels":
        outside = {name.split(".")[0] for name in names if not ours(name)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton"}, "kernels import torch and triton only"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("unifiedar.kernels.codes", "from unifiedar.ops import _native"),
        ("unifiedar.ops.codes", "import unifiedar.nn"),
        ("unifiedar.ops.codes", "from unifiedar.ops import sample"),
        ("unifiedar.ops.sample", "from .codes import residual_lookup"),
        ("unifiedar.nn.depth", "def f():\n    from unifiedar.nn.codes import Codebook"),
        ("unifiedar.nn.codes", "from unifiedar import models"),
        ("unifiedar.models.vilau", "from unifiedar import cli"),
        ("unifiedar.models.vilau", "import unifiedar"),
        ("unifiedar.checkpoints", "from unifiedar import ops"),
        ("unifiedar.cli", "import bench"),
        ("unifiedar.ops.codes", "import kernels.codes"),
    ],
)
def test_the_rule_bites(module, code):
    """Each of these would break the staircase; the checker must say so."""
    assert module in MODULES
    assert broken_rules(module, imports(ast.parse(code), module, False))


def test_triton_is_imported_only_by_kernels():
    """At import time, that is: a function may ask for its version."""
    for path in sources("unifiedar"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(name.split(".")[0] == "triton" for name in names), path


def test_torch_headers_are_included_by_the_library_only():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.name != "library.cpp":
            assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text(encoding="utf-8")), path


PUBLIC = [
    pytest.param(getattr(room, name), id=f"{room.__name__}.{name}")
    for room in (unifiedar.ops, unifiedar.nn)
    for name in room.__all__
    if callable(getattr(room, name))
]


def section(docstring: str, name: str) -> str:
    """The text under `Args:`, `Returns:` ..., up to the next section; empty if there is none."""
    pattern = rf"^ *{name}:\n(.*?)(?=^ *[A-Z][a-z]+:\n|\Z)"
    match = re.search(pattern, inspect.cleandoc(docstring), re.DOTALL | re.MULTILINE)
    return match.group(1) if match else ""


@pytest.mark.parametrize("public", PUBLIC)
def test_public_docstrings(public):
    docstring = inspect.getdoc(public) or ""
    first = docstring.split("\n")[0]
    assert first.endswith((".", ":")), "a first sentence"
    if not inspect.isfunction(public):
        return
    parameters = [name for name in inspect.signature(public).parameters if name != "self"]
    documented = section(docstring, "Args")
    for name in parameters:
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*\b.*:", documented, re.MULTILINE), f"Args must name {name}"
    source = ast.parse(inspect.getsource(public))
    nodes = list(ast.walk(source))
    if any(isinstance(node, ast.Return) and node.value is not None for node in nodes):
        assert section(docstring, "Returns").strip(), "Returns must say what comes back"
    raised = {
        node.exc.func.id
        for node in nodes
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    for error in raised:
        assert error in section(docstring, "Raises"), f"Raises must name {error}"


def test_operators_take_a_backend():
    for name in unifiedar.ops.__all__:
        function = getattr(unifiedar.ops, name)
        if inspect.isfunction(function):
            backend = inspect.signature(function).parameters["backend"]
            assert backend.default == "auto"
            assert backend.kind is inspect.Parameter.KEYWORD_ONLY


def test_every_module_says_what_it_is():
    for path in sources("unifiedar", "kernels", "bench", "tests"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


TEXT = {".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".toml", ".txt", ".json", ".cfg", ".in", ".yml", ".sh"}


def test_no_path_of_a_machine():
    """Folders of whoever wrote a file are nobody else's business, and work nowhere else."""
    path_of_a_machine = re.compile(r"(?<![\w.])/(home|root|Users|work|opt/env)/\w")
    for folder in ("unifiedar", "kernels", "csrc", "bench", "tests", "build_backend", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXT and path != Path(__file__):
                found = path_of_a_machine.search(path.read_text(encoding="utf-8"))
                assert not found, f"{path}: {found.group()}"
