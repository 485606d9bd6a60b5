"""Cases of tests: quick or slow, and the quick part of a product of options."""

import itertools
from typing import Any

import jax
import pytest


def param(*values: Any, quick: bool, id: str) -> Any:
    """Return a case of a test, slow unless it is quick."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow, id=id)


def pairs(names: str, *values: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize over a product, of which a Latin square is quick: the others determine the last value.

    Of three lists or more, of which the last is the shortest, any two values of different lists meet in a quick test.
    """
    params = []
    for at in itertools.product(*(range(len(v)) for v in values)):
        keys = [list(v)[i] for v, i in zip(values, at, strict=True)]
        quick = sum(at[:-1]) % len(values[-1]) == at[-1]
        params.append(param(*(v[k] for v, k in zip(values, keys, strict=True)), quick=quick, id=", ".join(keys)))
    return pytest.mark.parametrize(names, params)


def named(*values: Any) -> dict[str, Any]:
    """Return values by what they are called."""
    return {getattr(v, "__name__", str(v)): v for v in values}


WRAPS = {"eager": lambda f: f, "jit": jax.jit}
