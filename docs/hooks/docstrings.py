"""Docstrings for the reference, as griffe reads them; the pages introduce the modules."""

import re
from typing import Any

import griffe

# "    scale, bias: initial values, ...", with the lines that continue it.
TOGETHER = re.compile(r"^( +)([\w*]+(?:, [\w*]+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Name the section of an example as griffe does, give each name an entry, leave out the docstrings of modules."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Leave out the docstrings of a package and those below it that the reference shows."""
        for module in (pkg, *pkg.modules.values()):
            module.docstring = None

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = TOGETHER.sub(separate, text)


def separate(entry: re.Match[str]) -> str:
    """Return an entry for each of the names that share one; griffe looks up the type of each."""
    return "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))
