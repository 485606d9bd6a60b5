"""The architecture: a package imports from those before it only, and files are short."""

import ast
import re
from pathlib import Path

import pytest

import jaxbn

ROOT = Path(jaxbn.__file__).parent
# Each row may import from the rows before it, and within its own packages.
FLOORS = (
    ("_core",),
    ("domains", "whitening", "lstm", "statistics"),
    ("inference", "diagnostics"),
    ("_flax",),
    ("linen", "nnx", "convert"),
)
FLOOR = {package: i for i, row in enumerate(FLOORS) for package in row}


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Name the packages of jaxbn that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxbn":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("jaxbn."))


@pytest.mark.parametrize("path", [p for p in ROOT.glob("**/*.py") if p.parent != ROOT or p.stem != "__init__"], ids=str)
def test_imports_point_down(path):
    own = package_of(path)
    for other in imports(path):
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} must not import {other}"


def test_every_package_has_a_floor():
    assert {package_of(p) for p in ROOT.glob("*") if p.suffix == ".py" or p.is_dir()} - {
        "__init__",
        "__pycache__",
        "py.typed",
    } == set(FLOOR)


def test_the_core_lists_its_files():
    listed = re.findall(r"^    (\w+) ", jaxbn._core.__doc__, re.MULTILINE)
    assert sorted(listed) == sorted(p.stem for p in (ROOT / "_core").glob("*.py") if p.stem != "__init__")


def test_files_are_short():
    top = ROOT.parent
    folders = [top / name for name in ("jaxbn", "tests", "experiments", "examples", "docs")]
    lengths = {str(p.relative_to(top)): len(p.read_text().splitlines()) for f in folders for p in f.rglob("*.py")}
    assert len(lengths) > 250
    assert {path: n for path, n in lengths.items() if n >= 250} == {}
