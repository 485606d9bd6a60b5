"""Docstrings for the reference: "Example:" becomes griffe's "Examples:", and pages introduce the modules."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section of a docstring's example; leave out the docstrings of modules."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Leave out the docstrings of a package and those below it that the reference shows."""
        for module in (pkg, *pkg.modules.values()):
            module.docstring = None

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
