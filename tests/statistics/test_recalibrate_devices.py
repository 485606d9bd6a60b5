"""Recalibrate on many devices."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from two_layers import (
    EVEN,
    HIDDEN,
    MASK,
    Linen,
    Stateful,
    X,
    assert_statistics,
    by_layers,
    initial,
    once,
    recalibrate_linen,
    recalibrate_nnx,
)
from ways import AXIS, ONE, WAYS, mesh_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx


@pytest.mark.slow
@pytest.mark.parametrize("way", [ONE, *WAYS], ids=lambda way: way.name)
def test_linen_on_many_devices(way):
    """Unequal masks over NaN give one device's result in float64, layer by layer, which has both modes, or at once."""
    model = Linen(partial(jaxbn.linen.BatchNorm, use_running_average=False, axis_name=way.axis_name))
    variables = initial()

    thirds = slice(0, 8), slice(8, 16), slice(16, 24)

    def member(variables, batch):
        return model.apply(variables, *batch, mutable=["batch_stats"])

    with way._scope():
        placed = [way._placed(variables, (HIDDEN[at], MASK[at])) for at in thirds]
        apply, batches = way.transform(member), [batch for _, batch in placed]
        whole = recalibrate_linen(apply, placed[0][0], batches, layer_by_layer=way.name != "jit-auto")["batch_stats"]
    exact = once if way.name == "jit-auto" else by_layers
    wanted = exact([X[at] for at in thirds], [MASK[at] for at in thirds])
    assert_statistics([whole[n][part] for n in ("first", "second") for part in ("mean", "var")], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("split", [P("data", "model"), P("data")])
def test_features_spread_over_a_model_axis(kind, split):
    """The new statistics are where, and in the box in which, the old ones were."""
    mesh = mesh_of(kind, (4, 2), ("data", "model"))
    zeros = nn.with_partitioning(nn.initializers.zeros, ("model",))
    model = jaxbn.linen.BatchNorm(use_running_average=True, mean_init=zeros)
    x = np.repeat(X[:, :2], 2, axis=1)
    variables = model.init(jax.random.key(0), x)
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, NamedSharding(mesh, P("model")))
        batches = [jax.device_put(v, NamedSharding(mesh, split)) for v in (x[:8], x[8:])]
        stats = recalibrate_linen(partial(model.apply, mutable=["batch_stats"]), variables, batches)["batch_stats"]
    assert isinstance(stats["mean"], nn.Partitioned)
    for value, wanted in ((stats["mean"].value, x.mean(0, np.float64)), (stats["var"], x.astype(np.float64).var(0))):
        assert value.sharding.spec == P("model")
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


@pytest.mark.slow
def test_nnx_on_many_devices():
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    batches = [jax.device_put(x, NamedSharding(mesh, P(AXIS))) for x in EVEN]
    model = Stateful(jaxbn.nnx.BatchNorm)
    recalibrate_nnx(model, batches)
    assert_statistics([model.second.var[...]], [once(EVEN)[3]])
    model = Stateful(partial(jaxbn.nnx.BatchNorm, axis_name=AXIS))
    call = nnx.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
    recalibrate_nnx(model, batches, call, layer_by_layer=True)
    assert_statistics([model.first.mean[...], model.second.var[...]], [by_layers([X])[0], by_layers([X])[3]])
