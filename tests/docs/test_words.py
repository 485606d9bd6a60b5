"""Prose is in the words of the field: docstrings, comments, messages and pages."""

import ast
import io
import re
import tokenize
from pathlib import Path

import yaml

import jaxbn

ROOT = Path(jaxbn.__file__).parents[1]
FOLDERS = ("jaxbn", "experiments", "examples", "tests")
# All but this file, which shows some of the words.
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if p.name != "test_words.py")
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
(HOOK,) = [hook for hook in HOOKS if hook["id"] == "words"]
DENIED = re.compile(HOOK["entry"], re.IGNORECASE)
OPENERS = re.compile(r"(What|That|Of|Whose|Which|Whether|As|Where|How|By|With)\b")


def name(path):
    return path.relative_to(ROOT).as_posix()


def docstrings(path):
    """Yield the name and docstring of a module and all its classes and functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield getattr(node, "name", path.stem), ast.get_docstring(node)


def find_denied(source):
    """Return the line and the word for each denied word in the comments and strings of a program."""
    nodes, tokens = ast.walk(ast.parse(source)), tokenize.generate_tokens(io.StringIO(source).readline)
    prose = [(n.lineno, n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    prose += [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    return sorted((line, m[0]) for line, text in prose for m in DENIED.finditer(re.sub(r"\s+", " ", text)))


def test_programs_have_no_denied_words():
    assert [(name(path), *found) for path in FILES for found in find_denied(path.read_text())] == []


def test_pages_have_no_denied_words():
    """Pages that commands write have their own words."""
    pages = [page for page in PAGES if not re.match(HOOK["exclude"], name(page))]
    assert len(pages) > 10
    assert [(name(page), m[0]) for page in pages for m in DENIED.finditer(page.read_text())] == []


def test_docstrings_do_not_open_with_a_clause():
    opened = ((name(path), of) for path in FILES for of, text in docstrings(path) if OPENERS.match(text))
    assert list(opened) == []


def test_denied_words_are_found():
    source = '"""Layers behind others."""\nx = f"told {x}"  # x^ is x_hat, x^2 is not\ntold = f"{behind}"\n'
    assert find_denied(source) == [(1, "behind"), (2, "told"), (2, "x^")]
