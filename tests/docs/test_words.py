"""Docstrings, comments and messages are in the words of the field."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import jaxbn

ROOT = Path(jaxbn.__file__).parents[1]
FOLDERS = ("jaxbn", "experiments/benchmark", "experiments/compiled", "experiments/training")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

DENIED = {
    "behind": "after",
    "in front of": "before",
    "told": "given, specified",
    "whatever": "any, or name it",
    "in the place of": "instead of, for",
    "in place of": "instead of",
    "anew": "again",
    "nobody": "no name, no one; say which",
    "everybody": "all; say which",
    "thereby": "so",
    "whereof": "of which",
    "by decree": "by definition",
    r"x\^(?!\d)": "x_hat",
    "to go on as": "to continue as",
    "goes on with": "continues with",
}
OPENERS = re.compile(r"(What|That|Of|Whose|Which|Whether|As|Where|How|By|With)\b")


def docstrings(path):
    """Yield the name and docstring of a module and all its classes and functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield getattr(node, "name", path.stem), ast.get_docstring(node)


def prose(source):
    """Return the comments and strings of a program, one a line, with the number of its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return [(t.start[0], re.sub(r"\s+", " ", t.string)) for t in tokens if t.type in kinds]


def find_denied(source):
    """Return the line, the denied word and the advice for each denied word in a program's prose."""
    return [
        (line, word, advice)
        for line, text in prose(source)
        for word, advice in DENIED.items()
        if re.search(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_prose_has_no_denied_words(path):
    assert find_denied(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_do_not_open_with_a_clause(path):
    assert [name for name, text in docstrings(path) if OPENERS.match(text)] == []


def test_denied_words_are_found():
    source = '"""Layers behind others."""\nx = f"told {x}"  # x^ is x_hat, x^2 is not\nbehind = 1\n'
    assert {(line, word) for line, word, _ in find_denied(source)} == {(1, "behind"), (2, "told"), (2, r"x\^(?!\d)")}
