"""Tables in Markdown, and their place in a page, between two marks."""

from collections.abc import Sequence
from pathlib import Path


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def check_page(path: Path, marks: tuple[str, str]) -> None:
    """Whether the table can be put there, asked before the work.

    Raises:
        ValueError: the page is not there, or has no marks.
    """
    if not path.is_file():
        raise ValueError(f"the page for a table must be a file; there is none at {path}.")
    page = path.read_text(encoding="utf-8")
    if not all(page.count(mark) == 1 for mark in marks) or page.index(marks[0]) > page.index(marks[1]):
        raise ValueError(
            f"the page for a table must hold the marks {marks[0]} and {marks[1]} once, in this order; {path} does not."
        )


def put(path: Path, text: str, marks: tuple[str, str]) -> None:
    """Put `text` between the marks."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    path.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}", encoding="utf-8")
