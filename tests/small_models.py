"""Hold small linen and nnx models whose normalizations the tests of whole models convert and train."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen

KEY = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(3, 2, size=(8, 2)), np.float32)
STATS = ["batch_stats"]


class Net(nn.Module):
    """Dense, normalization, dense; the norm is a factory, as linen wants it."""

    norm: Any = partial(jaxbn.linen.BatchNorm, momentum=0.9)

    @nn.compact
    def __call__(self, x, train=True):
        """One number an example."""
        x = self.norm(use_running_average=not train, name="bn")(nn.Dense(3, name="first")(x))
        return nn.Dense(1, name="last")(x)


class Deep(nnx.Module):
    """Batch normalizations in a list, in a dict, deep down, used twice, and tied by a parameter."""

    def __init__(self, norm: Any = nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        shared = norm(3, rngs=rngs)
        self.zeta = nnx.Dict(inner=nnx.List([nnx.Linear(2, 3, rngs=rngs), shared]))
        self.alpha = shared
        self.tied = norm(3, rngs=rngs)
        self.tied.scale = shared.scale
        self.layers = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm(3, rngs=rngs, use_bias=False))

    def __call__(self, x):
        """Apply all of them, the shared one twice."""
        x = self.zeta["inner"][1](self.zeta["inner"][0](x))
        return self.layers(self.tied(self.alpha(x + 1)))
