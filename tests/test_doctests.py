"""Every example in the documentation runs: docstrings, and the code in README.md."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import jaxbn

MODULES = ["jaxbn", *(f"jaxbn.{m.name}" for m in pkgutil.iter_modules(jaxbn.__path__))]
README = Path(__file__).parent.parent / "README.md"
# Examples show JAX as users have it.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name == "jaxbn._convert_equinox":  # the one whose examples need the other library
        pytest.importorskip("equinox")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", jaxbn.__all__)
def test_every_public_name_has_an_example(name):
    public = getattr(jaxbn, name)
    if not isinstance(public, type):  # records are shown by the functions that make them
        assert ">>> " in public.__doc__, f"{name} has no example"


def test_readme():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        if ">>> " in block:
            test = doctest.DocTestParser().get_doctest(block, scope, "README", str(README), 0)
            runner = doctest.DocTestRunner()
            runner.run(test, clear_globs=False)
            assert runner.summarize().failed == 0
            scope = test.globs
        else:
            exec(compile(block, str(README), "exec"), scope)
