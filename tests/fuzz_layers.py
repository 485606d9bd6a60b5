"""Draw random layers and their inputs, by a seed."""

from typing import Any, NamedTuple

import numpy as np

MEMBERS = 8
SHARED = 10
WAYS = ("eager", "jit", "vmap", "shard_map-vma", "shard_map-unchecked", "pmap", "jit-auto", "jit-explicit")
NAMED = ("vmap", "shard_map-vma", "shard_map-unchecked", "pmap")
GROUPS = {
    "halves": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "pairs": [[0, 7], [1, 6], [2, 5], [3, 4]],
    "uneven": [[5], [0, 1, 2, 3, 4, 6, 7]],
}
PLAIN: dict[str, Any] = {
    "way": "eager",
    "positions": (),
    "features": (3,),
    "first": False,
    "mask": "none",
    "dtype": "float32",
    "momentum": "0.9",
    "groups": "none",
    "ghost": 1,
    "renorm": False,
    "activation": "none",
    "residual": False,
    "affine": True,
    "constant": False,
    "ratio": 0.0,
    "fill": "most",
    "old": 0.0,
}
# Of the arrays, not of the program.
VALUES = ("ratio", "fill", "old")


class Layer(NamedTuple):
    """A layer and how it is run.

    Attributes:
        way: one of `WAYS`.
        positions: axes between batch and features.
        features: feature axes, after the positions, or before them if `first`.
        mask: none, of rows, of entries.
        momentum: a number, or a schedule by name.
        ghost: how many ghost batches.
        constant: whether the state is compiled in.
        ratio: mean over std.
        fill: how the mask is filled: at random, all True, or without the rows of some members.
        old: how far the running mean is from the batch's, in std.
    """

    way: str
    positions: tuple[int, ...]
    features: tuple[int, ...]
    first: bool
    mask: str
    dtype: str
    momentum: str
    groups: str
    ghost: int
    renorm: bool
    activation: str
    residual: bool
    affine: bool
    constant: bool
    ratio: float
    fill: str
    old: float


def draw_layer(seed: int) -> Layer:
    """Return the layer of a seed."""
    of_program, of_arrays = np.random.default_rng((seed // SHARED, 0)), np.random.default_rng((seed, 1))

    def one(*choices: Any, rng: np.random.Generator = of_program) -> Any:
        return choices[rng.integers(len(choices))]

    way = one(*WAYS)
    groups = one("none", "none", *GROUPS) if way in NAMED else "none"
    # Fewer parts than shards are refused where types know the shards.
    ghost = (1, 1, 8, 16) if way == "jit-explicit" else (1, 1, 2, 8, 16) if groups == "none" else (1, 1, 2, 4)
    return Layer(
        way=way,
        positions=one((), (), (2,), (3, 2)),
        features=one((3,), (3,), (1,), (2, 2)),
        first=one(True, False),
        mask=one("none", "none", "rows", "entries"),
        dtype=one("float32", "float32", "bfloat16", "float16"),
        momentum=one("0.9", "0.0", "zero_debiased", "cumulative_average"),
        groups=groups,
        ghost=1 if groups == "uneven" else one(*ghost),
        renorm=one(True, False, False),
        activation=one("none", "tanh", "relu"),
        residual=one(True, False),
        affine=one(True, False),
        constant=one(True, False, False),
        ratio=one(0.0, 0.0, 3.0, 1e2, 1e4, rng=of_arrays),
        fill=one("most", "most", "all", "members", rng=of_arrays),
        old=one(0.0, 0.0, 5.0, 1e9, rng=of_arrays),
    )


class Inputs(NamedTuple):
    """The inputs of a layer, rounded to its dtype, in float64; arrays of x's shape have the features last."""

    x: np.ndarray
    dy: np.ndarray
    direction: np.ndarray
    residual: np.ndarray | None
    mask: np.ndarray | None
    scale: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    count: int


def make_inputs(layer: Layer, seed: int) -> Inputs:
    """Return inputs for a layer; NaN where the mask is False."""
    import jax.numpy as jnp

    rng = np.random.default_rng((seed, 2))
    shape, per_feature = (32, *layer.positions, *layer.features), layer.features

    def rounded(v):
        return np.asarray(jnp.asarray(v, layer.dtype)).astype(np.float64)

    ratio = min(layer.ratio, 3.0) if layer.dtype != "float32" else layer.ratio
    x = rounded(rng.standard_normal(shape) * rng.uniform(0.5, 2, per_feature) + ratio)
    mask = None
    if layer.mask != "none":
        mask = rng.random((32, *[1] * (x.ndim - 1)) if layer.mask == "rows" else shape) < 0.7
        if layer.fill == "all":
            mask[:] = True
        elif layer.fill == "members":
            mask[np.repeat(rng.random(MEMBERS) < 0.4, 32 // MEMBERS)] = False
        x = np.where(mask, x, np.nan)
    mean, of_state = ratio + layer.old, rng
    if layer.constant:
        of_state = np.random.default_rng((seed // SHARED, 3))
        mean = of_state.choice([0.0, 5.0, 1e9])

    def narrow(v):
        return v.astype(np.float32).astype(np.float64)

    return Inputs(
        x,
        rounded(rng.standard_normal(shape)),
        rounded(rng.standard_normal(shape)),
        rounded(rng.standard_normal(shape)) if layer.residual else None,
        mask,
        narrow(rng.uniform(0.5, 1.5, per_feature)) if layer.affine else None,
        narrow(rng.uniform(0.5, 1.5, per_feature)) if layer.affine else None,
        narrow(of_state.uniform(0.5, 1.5, per_feature) + mean),
        narrow(of_state.uniform(0.5, 1.5, per_feature)),
        int(of_state.integers(1, 50)),
    )
