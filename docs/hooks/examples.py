"""Docstrings for the reference: a section "Example:" is rendered as code, as griffe renders "Examples:"."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Name the section of a docstring's example as griffe does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
