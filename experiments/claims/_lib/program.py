"""Identify the program that measures a claim by a hash of its code."""

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def source_files(name: str) -> list[Path]:
    """List the program that measures the claim `name`: the library, the trainer, and the modules of the claims."""
    here = ROOT / "experiments"
    trainer = [here / "__init__.py", here / "disk.py", *(here / "training").glob("*.py")]
    library = ("__init__", "study", "trained", "search", "splits", "networks", "intervals", "values")
    own = ["__init__.py", *(f"_lib/{n}.py" for n in library)]
    own.append(f"{name}/measure.py")
    return sorted((*(ROOT / "jaxbn").rglob("*.py"), *trainer, *(here / "claims" / part for part in own)))


def source_hash(name: str) -> str:
    """Hash the code of `source_files`; comments, docstrings and layout make no difference."""
    return hashlib.sha256(
        "\n".join(_code(p.read_text(encoding="utf-8")) for p in source_files(name)).encode()
    ).hexdigest()


def _code(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
