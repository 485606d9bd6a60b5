"""What else was tried: other ways to the same derivative, beside flax's layer and ours, by the same clock.

    python -m experiments.benchmark.tried

A way is a choice of pivot and of how the sums about it are asked for. All are written by hand, without a mask, a
schedule or several devices, in the order forward, backward, as one program; so the first of them, which does what the
library does, shows what the library's generality costs. Writes `docs/benchmark/tried.json`, and a table into
`docs/speed.md`.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from experiments import disk, tables
from experiments.benchmark import accuracy, passes, report, steady
from experiments.benchmark.bars import geometric_mean
from experiments.benchmark.clock import Call, interleaved
from experiments.benchmark.contenders import contender
from experiments.benchmark.layers import LAYERS, arguments, present
from experiments.benchmark.sizes import NOBODYS, OURS, Case
from experiments.interrupt import refuse

SHAPES = ((4096, 512), (8, 56, 56, 64), (8, 56, 56, 256), (8, 14, 14, 1024))
DTYPES, EPILOGUES = ("float32", "bfloat16"), ("none", "relu")
ROUNDS = 21
BLOCK = 16  # features, of which a cache holds all values at most sizes
BESIDE = ("flax", OURS, *NOBODYS, report.FASTEST)  # as they are
FAR = 1e4  # mean / standard deviation at which the error is taken
PAGE, RECORD = Path("docs/speed.md"), Path("docs/benchmark/tried.json")


class About(NamedTuple):
    """Statistics, and how the rest is computed from them.

    Attributes:
        pivot, rest: the mean is their sum.
        var: the biased variance.
        centred: `x - pivot`, as the backward pass should ask for it.
    """

    pivot: jax.Array
    rest: jax.Array
    var: jax.Array
    centred: jax.Array


Total = Callable[[jax.Array], jax.Array]
Way = Callable[[Any, jax.Array], About]
Program = Callable[..., dict[str, Any]]
Normalized = Callable[[jax.Array], jax.Array]


def _sum(v: jax.Array) -> jax.Array:
    return jnp.sum(v, tuple(range(v.ndim - 1)), dtype=jnp.float32)


def _minus(x: jax.Array, pivot: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) - pivot


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _sample(x: jax.Array, least: int = 64) -> jax.Array:
    """The mean of the first values, one in `least` or more."""
    flat = x.reshape(-1, x.shape[-1])
    rows = 1 << math.ceil(math.log2(max(1, flat.shape[0] / least)))
    return _sum(flat[:rows]) / rows


def _product(v: jax.Array) -> jax.Array:
    """The sum as a product of a vector of ones and a matrix, which other kernels compute."""
    ones = jnp.ones(_rows(v), v.dtype)
    return jnp.dot(ones, v.reshape(-1, v.shape[-1]), preferred_element_type=jnp.float32)


def _shared(pivot: jax.Array, x: jax.Array, total: Total = _sum) -> About:
    d = _minus(x, pivot)
    rest = total(d) / _rows(x)
    return About(pivot, rest, total(d * d) / _rows(x) - rest * rest, d)


def _barred(pivot: jax.Array, x: jax.Array) -> About:
    """Each sum subtracts for itself, behind barriers that the compiler finds the same subtraction too late to share."""
    first = lax.optimization_barrier((x, pivot))
    second = lax.optimization_barrier(first)
    third = lax.optimization_barrier(second)
    rest = _sum(_minus(*first)) / _rows(x)
    var = _sum(jnp.square(_minus(*second))) / _rows(x) - rest * rest
    return About(pivot, rest, var, _minus(*third))


def _apart(pivot: jax.Array, x: jax.Array) -> About:
    """Each sum subtracts for itself: expressions that no compiler finds to be the same."""
    rest = -_sum(pivot - x.astype(jnp.float32)) / _rows(x)
    mean = pivot + rest
    rounding = rest - (mean - pivot)
    return About(mean, rounding, _sum(jnp.square(_minus(x, pivot))) / _rows(x) - rest * rest, _minus(x, mean))


def _two_passes(x: jax.Array) -> About:
    pivot = _sample(x)
    rest = _sum(_minus(x, pivot)) / _rows(x)
    mean = pivot + rest
    return About(mean, rest - (mean - pivot), _sum(jnp.square(_minus(x, mean))) / _rows(x), _minus(x, mean))


def _one_reduction(x: jax.Array) -> About:
    d, zero = _minus(x, _sample(x)), jnp.zeros((), jnp.float32)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    shift, square = lax.reduce((d, d * d), (zero, zero), add, tuple(range(x.ndim - 1)))
    rest = shift / _rows(x)
    return About(_sample(x), rest, square / _rows(x) - rest * rest, d)


WAYS: dict[str, Way] = {
    "deviations from the mean of a 64th, each sum's own, behind barriers": lambda state, x: _barred(_sample(x), x),
    "the same, an array that all sums share": lambda state, x: _shared(_sample(x), x),
    "the same array, from the mean of a 16th": lambda state, x: _shared(_sample(x, 16), x),
    "the same array, from the mean of all, a pass more": lambda state, x: _shared(_sum(x) / _rows(x), x),
    "the same array, from the running mean": lambda state, x: _shared(state.mean, x),
    "each sum's own, without barriers": lambda state, x: _apart(_sample(x), x),
    "mean first, then squares about it": lambda state, x: _two_passes(x),
    "both sums in one reduction": lambda state, x: _one_reduction(x),
}


def _selected(normalized: Normalized, x: jax.Array, g: jax.Array, user: int) -> jax.Array:
    """The gradient behind a ReLU, the same array for all its users."""
    del user
    return jnp.where(normalized(x) > 0, g.astype(jnp.float32), 0)


def _clamped(normalized: Normalized, x: jax.Array, g: jax.Array, user: int) -> jax.Array:
    """The same without a select, which sums do not fuse with: a product with 0 or 1, each user's own."""
    for _ in range(user):
        x, g = lax.optimization_barrier((x, g))
    return g.astype(jnp.float32) * jnp.minimum(jnp.maximum(normalized(x) * 1e38, 0), 1)


def program(way: Way, relu: bool, total: Total = _sum, behind: Any = _selected) -> Program:
    """Forward and backward pass; takes and gives what `layers.program` does."""

    def both(params, state, x, residual, g):
        about = way(state, x)
        inverse = lax.rsqrt(about.var + 1e-5)
        gain = params["scale"] * inverse

        def normalized(x):
            return (_minus(x, about.pivot) - about.rest) * gain + params["bias"]

        def gradient(user):
            return behind(normalized, x, g, user) if relu else g.astype(jnp.float32)

        y = normalized(x)
        d_bias = total(gradient(1))
        d_scale = (total(gradient(2) * about.centred) - about.rest * d_bias) * inverse
        slope = d_scale * inverse / _rows(x)
        dx = gain * ((gradient(0) - d_bias / _rows(x)) - (_minus(x, about.pivot) - about.rest) * slope)
        new = (0.99 * state.mean + 0.01 * (about.pivot + about.rest), 0.99 * state.var + 0.01 * about.var)
        y = jnp.maximum(y, 0) if relu else y
        d_params = {"scale": d_scale, "bias": d_bias}
        return {"y": y.astype(x.dtype), "state": new, "d_params": d_params, "dx": dx.astype(x.dtype)}

    return both


def by_blocks(way: Way, relu: bool) -> Program:
    """The same for `BLOCK` features after the other, so that the second time their values come from a cache."""
    one = program(way, relu)

    def both(*args):
        features = args[2].shape[-1]

        def step(i, whole):
            at = i * BLOCK

            def cut(v):
                return lax.dynamic_slice_in_dim(v, at, BLOCK, v.ndim - 1) if v.shape[-1:] == (features,) else v

            part = one(*jax.tree.map(cut, args))
            return jax.tree.map(lambda v, p: lax.dynamic_update_slice_in_dim(v, p, at, v.ndim - 1), whole, part)

        empty = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(one, *args))
        return lax.fori_loop(0, features // BLOCK, step, empty)

    return both


_FIRST = next(iter(WAYS.values()))
PROGRAMS: dict[str, Callable[[bool], Program]] = {
    **{name: partial(program, way) for name, way in WAYS.items()},
    "the first, the gradient behind a ReLU not selected but multiplied": partial(program, _FIRST, behind=_clamped),
    "the same array, each sum a product with a vector of ones": partial(
        program, lambda state, x: _shared(_sample(x), x, _product), total=_product
    ),
    f"both directions for {BLOCK} features after the other": partial(
        by_blocks, lambda state, x: _shared(_sample(x), x)
    ),
}


def rows() -> Iterator[dict[str, Any]]:
    """A row for each way, dtype and epilogue: time over flax's, arrays moved, error of y far from 0."""
    for dtype, epilogue in itertools.product(DTYPES, EPILOGUES):
        found: dict[str, list[float]] = {}
        moved: dict[str, int | None] = {}
        wrong: dict[str, float] = {}
        for shape in SHAPES:
            case = Case(shape, dtype, epilogue)
            host, far = accuracy.inputs(case, accuracy.NEAR), accuracy.inputs(case, FAR)
            calls = {name: contender(name, case, host).calls["forward+backward"] for name in present(BESIDE)}
            layer = LAYERS[OURS](shape[-1])
            args, args_far = arguments(layer, host), arguments(layer, far)
            exact = accuracy.exact(case, far).y
            for name, make in PROGRAMS.items():
                compiled = jax.jit(make(case.relu)).lower(*args).compile()
                calls[name] = Call(partial(compiled, *args), jax.block_until_ready)
                text = compiled.as_text() or ""
                # Inside a loop operations are not counted.
                moved[name] = None if " while(" in text else passes.moved(text, math.prod(shape))
                y = np.asarray(compiled(*args_far)["y"][..., : accuracy.FEATURES], np.float64)
                wrong[name] = max(wrong.get(name, 0.0), float(np.abs(y - exact).max()))
            sampled = interleaved(calls, ROUNDS)
            for name in calls:
                ratio = np.median(sampled[name].seconds / sampled["flax"].seconds)
                found.setdefault(name, []).append(float(ratio))
        for name, ratios in found.items():
            yield {
                "way": name,
                "dtype": dtype,
                "epilogue": epilogue,
                "over_flax": geometric_mean(ratios),
                "arrays_moved": moved.get(name),
                "error_far": wrong.get(name),
            }


def table(found: list[dict[str, Any]]) -> str:
    """As Markdown: each way once."""
    body = []
    for name in dict.fromkeys(r["way"] for r in found):
        here = {(r["dtype"], r["epilogue"]): r for r in found if r["way"] == name}
        plain = here["float32", "relu"]
        moved, wrong = plain["arrays_moved"], plain["error_far"]
        times = [f"{here[key]['over_flax']:.2f}" for key in itertools.product(DTYPES, EPILOGUES)]
        body.append([name, *times, "" if moved is None else str(moved), "" if wrong is None else f"{wrong:.0e}"])
    heads = [
        f"{dtype}{', ReLU' if epilogue == 'relu' else ''}" for dtype, epilogue in itertools.product(DTYPES, EPILOGUES)
    ]
    return tables.markdown(
        ["time / flax", *heads, "arrays moved, float32, ReLU", f"error of y at mean/std {FAR:g}, float32"], body
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """Measure other ways to compute batch normalization, and put their table into `docs/speed.md`."""


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; the exit code."""
    tyro.cli(Command, args=arguments, prog="python -m experiments.benchmark.tried")
    try:
        tables.check_page(PAGE, report.MARKS)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        found = []
        for row in rows():
            found.append(row)
            print(row, flush=True)
        disk.write_json(RECORD, {"command": "python -m experiments.benchmark.tried", "rows": found})
        tables.put(PAGE, table(found), report.MARKS)
    except OSError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    steady.restart()
    sys.exit(main(sys.argv[1:]))
