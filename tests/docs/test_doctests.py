"""Every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import jaxbn

MODULES = ["jaxbn", *(m.name for m in pkgutil.walk_packages(jaxbn.__path__, "jaxbn."))]
# Examples show JAX as users have it.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name == "jaxbn.convert._equinox":  # the one whose examples need the other library
        pytest.importorskip("equinox")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def public_names():
    """Each public function and class with the one path that users have for it."""
    for module in (jaxbn, *(m for m in vars(jaxbn).values() if inspect.ismodule(m) and "._" not in m.__name__)):
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]:
            if not inspect.ismodule(getattr(module, name)):
                yield f"{module.__name__}.{name}"


@pytest.mark.parametrize("name", list(public_names()))
def test_every_public_name_has_an_example(name):
    module, _, name = name.rpartition(".")
    public = getattr(importlib.import_module(module), name)
    if not isinstance(public, type):  # records are shown by the functions that make them
        assert ">>> " in public.__doc__, f"{name} has no example"
