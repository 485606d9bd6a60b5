"""Docstrings for the reference: "Example:" becomes griffe's "Examples:", and pages introduce the modules."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section of a docstring's example; leave out the docstrings of modules."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.is_module:
            obj.docstring = None
        elif obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
