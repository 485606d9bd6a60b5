"""Make models to fold, and compare their outputs."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.nnx

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(3, 6, 5, 2)), np.float32)


def trained(variables):
    """Variables with statistics, scales and biases of some age; kernels as they are."""
    rng = np.random.default_rng(1)

    def aged(path, leaf):
        name = path[-1].key
        value = rng.uniform(0.3, 3, leaf.shape) if name == "var" else rng.normal(0.3, 1, leaf.shape)
        return leaf if name in ("kernel", "count") else jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(aged, flax.core.unfreeze(variables))


def near(got, wanted, tolerance=1e-5):
    """Relative to the largest output: a few roundings of 6e-8 in each of six layers."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.max(np.abs(wanted)))


def aged(model):
    """Return the model, with statistics, scales and biases of some age."""
    rng = np.random.default_rng(2)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, (nnx.BatchNorm, jaxbn.nnx.BatchNorm)):
            module.mean.set_value(jnp.asarray(rng.normal(size=module.mean.shape), jnp.float32))
            module.var.set_value(jnp.asarray(rng.uniform(0.3, 3, module.var.shape), jnp.float32))
            for v in (module.scale, module.bias):
                if v is not None:
                    v.set_value(jnp.asarray(rng.normal(size=v.shape), jnp.float32))
    return model
