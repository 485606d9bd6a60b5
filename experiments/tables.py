"""Tables in Markdown, and their place in a page, between two marks."""

import os
from collections.abc import Sequence
from pathlib import Path

from experiments import disk


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def check_page(path: Path, marks: tuple[str, str]) -> None:
    """Check that the table can be put there, before the work.

    Raises:
        DiskError: the page is not there, cannot be written, or has no marks.
    """
    if not path.is_file():
        raise disk.DiskError(f"the page for a table must be a file; there is none at {path}.")
    # It is replaced by another file, which its folder must allow.
    if not (os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK)):
        raise disk.DiskError(f"the page for a table must be a file that can be written; {path} or its folder cannot.")
    page = path.read_text(encoding="utf-8")
    if not all(page.count(mark) == 1 for mark in marks) or page.index(marks[0]) > page.index(marks[1]):
        raise disk.DiskError(
            f"the page for a table must hold the marks {marks[0]} and {marks[1]} once, in this order; {path} does not."
        )


def put(path: Path, text: str, marks: tuple[str, str]) -> None:
    """Put `text` between the marks."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    disk.write(path, f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")
