"""Hold the layer and the batches that the tests on several devices compare with one device and with float64 NumPy."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ways import MEMBERS, ONE, Way

import jaxbn

ROWS, FEATURES = 32, 3
LOCAL = ROWS // MEMBERS
# How many of its rows each member counts: none, all, and different numbers between.
COUNTED = np.arange(LOCAL)[None, :] < np.array([0, 1, 4, 2, 3, 1, 4, 2])[:, None]
each_check = pytest.mark.parametrize("check_vma", [True, False])


def shards(rows: int = ROWS, members: int = MEMBERS, features: int = FEATURES, seed: int = 0) -> np.ndarray:
    """Values of unit spread whose mean grows from 0 on the first member to 14 on the last."""
    offset = np.linspace(0, 14, members)[:, None, None]
    values = np.random.default_rng(seed).standard_normal((members, rows // members, features)) + offset
    return values.reshape(rows, features).astype(np.float32)


X = shards()
MASK = COUNTED.reshape(ROWS, 1)
FEATURE_MASK = np.stack([np.roll(MASK[:, 0], 5 * i) for i in range(FEATURES)], 1)


class Case(NamedTuple):
    """An input, what counts of it, and options of `bn_apply`. `traced`: `train` is data rather than program."""

    x: np.ndarray
    mask: np.ndarray | None = None
    train: bool = True
    traced: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)


CASES = {
    "plain": Case(X),
    "mask-nan": Case(np.where(MASK, X, np.nan).astype(np.float32), MASK),
    "mask-inf": Case(np.where(MASK, X, -np.inf).astype(np.float32), MASK),
    "mask-huge": Case(np.where(MASK, X, 3e38).astype(np.float32), MASK),
    "mask-per-feature": Case(np.where(FEATURE_MASK, X, np.nan).astype(np.float32), FEATURE_MASK),
    "mask-all": Case(np.full_like(X, np.nan), np.zeros((ROWS, 1), bool)),
    "activation": Case(X, options={"activation": jax.nn.relu}),
    "unbiased": Case(np.where(MASK, X, np.nan).astype(np.float32), MASK, options={"unbiased_running_var": True}),
    "no-update": Case(X, options={"update": False}),
    "traced-train": Case(X, MASK, traced=True),
    "traced-evaluate": Case(X, MASK, train=False, traced=True),
    "one-row-each": Case(shards(MEMBERS)),
    "no-rows": Case(np.zeros((0, FEATURES), np.float32)),
    "no-features": Case(np.zeros((ROWS, 0), np.float32)),
}


def arguments(case: Case) -> tuple[dict, dict]:
    """Return the arrays that every member has, and those that are split over them."""
    rng = np.random.default_rng(1)
    width = case.x.shape[1]
    scale, bias, mean = rng.standard_normal((3, width)).astype(np.float32)
    params, state = jaxbn.bn_init(width, scale=scale, bias=bias, mean=mean, var=2.0)
    parts = {name: rng.standard_normal(case.x.shape).astype(np.float32) for name in ("residual", "cotangent")}
    parts |= {"x": case.x} | ({} if case.mask is None else {"mask": case.mask})
    return {"params": params, "state": state} | ({"train": np.asarray(case.train)} if case.traced else {}), parts


def step(way: Way, train: bool = True, **options):
    """Return a member function: value, new state and gradients of one layer."""

    def member(whole, parts):
        def loss(params, x, residual):
            y, state = jaxbn.bn_apply(
                params,
                whole["state"],
                x,
                whole.get("train", train),
                momentum=0.9,
                axis_name=way.axis_name,
                mask=parts.get("mask"),
                residual=residual,
                **options,
            )
            terms = y.astype(jnp.float32) * parts["cotangent"]
            return jnp.sum(jnp.where(parts["mask"], terms, 0) if "mask" in parts else terms), (y, state)

        of = (whole["params"], parts["x"], parts["residual"])
        (d_params, d_x, d_residual), (y, state) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*of)
        return {"y": y, "x": d_x, "residual": d_residual}, {"params": way.total(d_params), "state": state}

    return member


@cache
def on_one_device(name: str) -> tuple[Any, Any]:
    """Return the answer on the whole batch, with `train` a Python bool."""
    case = CASES[name]
    whole, parts = arguments(case)
    whole.pop("train", None)
    return ONE.run(step(ONE, case.train, **case.options), whole, parts)


def counted(parts: Any, mask: np.ndarray | None) -> Any:
    """`parts` with what does not count set to 0: what padding is normalized to is not compared."""
    return parts if mask is None else jax.tree.map(lambda v: np.where(mask, v, np.zeros((), v.dtype)), parts)


def in_numpy(case: Case) -> tuple[np.ndarray, tuple]:
    """y and the new state in float64."""
    whole, parts = arguments(case)
    mask = np.broadcast_to(True if case.mask is None else case.mask, case.x.shape)
    x = np.where(mask, case.x, 0).astype(np.float64)
    n = mask.sum(0)
    scale, bias, old_mean, old_var, old_count = (np.asarray(v, np.float64) for v in (*whole["params"], *whole["state"]))
    mean = x.sum(0) / np.maximum(n, 1)
    var = (np.where(mask, x - mean, 0) ** 2).sum(0) / np.maximum(n, 1)
    used = (mean, var) if case.train else (old_mean, old_var)
    y = (x - used[0]) / np.sqrt(used[1] + 1e-5) * scale + bias + parts["residual"]
    y = np.maximum(y, 0) if "activation" in case.options else y
    if case.options.get("unbiased_running_var"):
        var = var * n / np.maximum(n - 1, 1)
    takes_part = (n > 0) & case.train & case.options.get("update", True)
    kept = [np.where(takes_part, 0.9 * o + 0.1 * b, o) for o, b in ((old_mean, mean), (old_var, var))]
    return np.where(mask, y, 0), (*kept, old_count + np.any(takes_part))


def assert_equals_numpy(case: Case, parts: Any, state: Any, rtol: float = 0.0) -> None:
    """y and state are those of float64 NumPy."""
    y, wanted = in_numpy(case)
    np.testing.assert_allclose(counted(parts["y"], case.mask), y, rtol=0, atol=2e-5)
    for a, b in zip(state, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=rtol)


def train_step(axis_name, params, state, x, mask=None, **options):
    """Value, new state and gradients of one layer with a loss that every entry enters differently."""

    def loss(params, x):
        y, new = jaxbn.bn_apply(
            params, state, x, True, momentum=0.9, mask=mask, axis_name=axis_name, activation=jnp.tanh, **options
        )
        return jnp.sum(jnp.where(mask, y * y, 0) if mask is not None else y * y), (y, new)

    (d_params, d_x), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, new, d_params, d_x


PLAIN = jax.jit(partial(train_step, None))
