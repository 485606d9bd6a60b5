"""Store no statistics that half precision cannot hold."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import KEY, STATS, X, norm

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def half(tree):
    return jax.tree.map(lambda v: v.astype(jnp.float16) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


def in_nnx(x):
    layer = norm()
    nnx.update(layer, half(nnx.state(layer)))
    layer(x, mask=None)
    return [layer.mean[...], layer.var[...]]


def in_linen(x):
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, force_float32_reductions=False, param_dtype=jnp.float16, dtype=jnp.float32
    )
    stats: Any = layer.apply(layer.init(KEY, x), x, mutable=STATS)[1]["batch_stats"]
    return [stats["mean"], stats["var"]]


def in_domains(x):
    params, state = jaxbn.domains.domain_init(2, 3)
    new = jaxbn.domains.domain_apply(params, half(state), x, True, 1)[1]
    return [new.mean, new.var]


def in_lstm(x):
    params, state = jaxbn.lstm.lstm_init(KEY, 3, 2, max_steps=1)
    params = params._replace(input_kernel=params.input_kernel * 100)
    new = jaxbn.lstm.lstm_apply(params, half(state), jaxbn.lstm.lstm_carry(params, 8), x[None], True)[2].input_norm
    return [new.mean, new.var]


def in_adapt(x):
    new = jaxbn.statistics.adapt(half(jaxbn.bn_init(3)[1]), jaxbn.moments(x))
    return [new.mean, new.var]


def in_linen_recalibrate(x):
    layer = jaxbn.linen.BatchNorm(use_running_average=True, dtype=jnp.float32)
    variables = half(layer.init(KEY, x))
    stats = jaxbn.linen.recalibrate(lambda v, x: layer.apply(v, x, mutable=STATS), variables, [x])["batch_stats"]
    return [stats["mean"], stats["var"]]


def in_nnx_recalibrate(x):
    layer = norm()
    nnx.update(layer, half(nnx.state(layer)))
    jaxbn.nnx.recalibrate(layer, [x])
    return [layer.mean[...], layer.var[...]]


PLACES = [in_nnx, in_linen, in_domains, in_lstm, in_adapt, in_linen_recalibrate, in_nnx_recalibrate]


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_half_precision_keeps_old_statistics_on_overflow(place):
    """A feature whose variance is finite in float32 and not in float16 keeps its old ones; the others move."""
    mean, var = (np.asarray(v, np.float32) for v in place(X * np.array([1, 1e4, 1], np.float32)))
    assert mean.dtype == np.float32
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()
    if place is not in_lstm:
        mean, var = mean.reshape(-1, 3)[-1], var.reshape(-1, 3)[-1]
        assert (mean[1], var[1]) == (0, 1)
        assert (var[[0, 2]] != 1).all()


def test_conversion_refuses_overflow_of_the_target():
    target = {"batch_stats": {"bn": {"mean": np.zeros(3, np.float16), "var": np.zeros(3, np.float16)}}}
    saved = {"bn.running_mean": np.zeros(3), "bn.running_var": np.full(3, 1e6)}
    with pytest.raises(ValueError, match="float16 does not hold"):
        jaxbn.convert.from_torch_network(target, saved, {"bn": "bn"})
