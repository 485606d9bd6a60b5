"""Hold the layer and the plain formula with the same options, in float64, and compare their derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

ROWS, FEATURES = 6, 2
Inputs = dict[str, jax.Array]


class Case(NamedTuple):
    """One set of options. `given` are the differentiated inputs beside x; `activation` takes them too."""

    given: tuple[str, ...] = ("scale", "bias")
    train: bool | str = True
    masked: bool = False
    activation: Callable[[jax.Array, Inputs], jax.Array] | None = None


CASES = {
    "train": Case(),
    "masked": Case(masked=True),
    "no scale": Case(given=("bias",)),
    "no bias": Case(given=("scale",)),
    "activation": Case(activation=lambda y, _: jnp.tanh(y)),
    "relu": Case(activation=lambda y, _: jax.nn.relu(y)),
    "prelu": Case(("scale", "bias", "slope"), activation=lambda y, given: jnp.where(y > 0, y, given["slope"] * y)),
    "residual": Case(given=("scale", "bias", "residual")),
    "everything": Case(
        ("scale", "bias", "residual", "slope"),
        "traced on",
        True,
        lambda y, given: y * jax.nn.sigmoid(given["slope"] * y),
    ),
    "evaluation": Case(given=("scale", "bias", "mean", "var"), train=False),
    "evaluation, everything": Case(("scale", "bias", "mean", "var", "residual"), False, True, lambda y, _: jnp.tanh(y)),
    "traced training": Case(given=("scale", "bias", "mean", "var"), train="traced on"),
    "traced evaluation": Case(given=("scale", "bias", "mean", "var"), train="traced off"),
}

SHAPES = {"x": (ROWS, FEATURES), "residual": (ROWS, FEATURES), "slope": ()}


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """Values of every input of a case, of a size that no derivative vanishes at."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(1, 0.5, SHAPES.get(name, (FEATURES,))) for name in ("x", *case.given)}
    if "var" in values:
        values["var"] = np.abs(values["var"]) + 0.5
    return {name: jnp.asarray(v) for name, v in values.items()}


MASK = np.array([[1, 1], [0, 1], [1, 1], [1, 0], [1, 1], [0, 0]], bool)
WEIGHTS = np.random.default_rng(99).normal(size=(ROWS, FEATURES))


def ours(case: Case, given: Inputs) -> jax.Array:
    """Apply the layer under test."""
    train = jnp.array(case.train == "traced on") if isinstance(case.train, str) else case.train
    start = jaxbn.bn_init(FEATURES, dtype=jnp.float64)[1]
    act = case.activation
    y, _ = jaxbn.bn_apply(
        BatchNormParams(given.get("scale"), given.get("bias")),
        BatchNormState(given.get("mean", start.mean), given.get("var", start.var), start.count),
        given["x"],
        train,
        mask=MASK if case.masked else None,
        residual=given.get("residual"),
        activation=None if act is None else lambda y: act(y, given),
    )
    return y


def plain(case: Case, given: Inputs) -> jax.Array:
    """Compute the formula."""
    act = case.activation
    return oracle.plain(
        given["x"],
        given.get("scale"),
        given.get("bias"),
        mask=jnp.asarray(MASK) if case.masked else None,
        residual=given.get("residual"),
        running=(given["mean"], given["var"]) if "mean" in given else None,
        train=case.train in (True, "traced on"),
        activation=None if act is None else lambda y: act(y, given),
    )


def loss(layer, case, given):
    """Return a scalar of the output, curved so that no second derivative is zero by chance."""
    return jnp.sum(WEIGHTS * jnp.sin(layer(case, given)))


def assert_same(got, want):
    """1e-9 of what is of the size of one: float64 rounding, times what second derivatives amplify it by."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))
