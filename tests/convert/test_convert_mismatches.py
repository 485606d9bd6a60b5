"""Arrays that do not fit a layer: the message names all that is wrong, and nothing is changed."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from neighbours import Equinox, assert_same, flat

import jaxbn
import jaxbn.nnx
from jaxbn import BatchNormParams, convert

TORCH_ENTRIES = {
    "weight": np.ones(3, np.float32),
    "bias": np.ones(3, np.float32),
    "running_mean": np.zeros(3, np.float32),
    "running_var": np.ones(3, np.float32),
    "num_batches_tracked": np.int64(5),
}
EMA = {"hidden": np.zeros((1, 3)), "average": np.zeros((1, 3)), "counter": np.int32(1)}


class Broken(NamedTuple):
    """A conversion that must fail, and all that its message must say."""

    run: Callable[[], Any]
    says: tuple[str, ...]


def torch_with(*without, **changes):
    """`TORCH_ENTRIES` without some and with others."""
    return {name: value for name, value in TORCH_ENTRIES.items() if name not in without} | changes


def functional(features=3, **changes):
    """Params and state that do not fit each other if anything is changed."""
    params, state = jaxbn.bn_init(features)
    return BatchNormParams(**params._asdict() | changes), state


BROKEN = {
    "torch": Broken(
        lambda: convert.from_torch(torch_with("running_var", "num_batches_tracked", bias=np.ones(4), conv=0, fc=0)),
        ("missing: running_var, num_batches_tracked", "unexpected: conv, fc", "bias (4,), where running_mean has (3,)"),
    ),
    "torch-types": Broken(
        lambda: convert.from_torch(torch_with(weight=np.ones(3, int), num_batches_tracked=np.float32(1))),
        ("weight int64, which is not real floating point", "num_batches_tracked float32, which is not an integer"),
    ),
    "torch-counts": Broken(
        lambda: convert.from_torch(torch_with(num_batches_tracked=np.int64(2**31))), ("2147483648", "int32")
    ),
    "torch-count-shape": Broken(
        lambda: convert.from_torch(torch_with(num_batches_tracked=np.ones(3, int))), ("(3,), where a scalar",)
    ),
    "torch-matrix": Broken(
        lambda: convert.from_torch({n: v if v.shape == () else v[None] for n, v in TORCH_ENTRIES.items()}),
        tuple(f"{name} (1, 3), where one number a channel" for name in TORCH_ENTRIES if "num" not in name),
    ),
    "torch-prefix": Broken(
        lambda: convert.from_torch({f"bn1.{name}": value for name, value in TORCH_ENTRIES.items()}, prefix="bn"),
        ("missing: bn.running_mean, bn.running_var, bn.num_batches_tracked",),
    ),
    "to-torch-bias-alone": Broken(lambda: convert.to_torch(*functional(scale=None)), ("scale of ones",)),
    "to-torch": Broken(
        lambda: convert.to_torch(*functional(scale=np.ones(4), bias=np.ones((1, 3)))),
        ("scale (4,), where mean has (3,)", "bias (1, 3), where mean has (3,)"),
    ),
    "to-torch-complex": Broken(
        lambda: convert.to_torch(*jaxbn.bn_init(3, dtype=jnp.complex64)),
        ("scale complex64, which is not real", "mean complex64, which is not real"),
    ),
    "keras": Broken(
        lambda: convert.from_keras({"gamma": np.ones(2), "moving_mean": np.ones(3), "moving_stddev": np.ones(3)}),
        ("missing: moving_variance", "unexpected: moving_stddev", "gamma (2,), where moving_mean has (3,)"),
    ),
    "haiku": Broken(
        lambda: convert.from_haiku(
            {"bn": {"scale": np.ones((1, 4)), "w": np.ones((1, 3))}}, {"bn/~/mean_ema": EMA, "bn/~/var_ema": {}}, "bn"
        ),
        (
            "missing: bn/~/var_ema/average, bn/~/var_ema/hidden, bn/~/var_ema/counter",
            "unexpected: bn/w",
            "bn/scale (4,), where bn/~/mean_ema/average has (3,)",
        ),
    ),
    "haiku-axis": Broken(
        lambda: convert.from_haiku({}, {"bn/~/mean_ema": EMA, "bn/~/var_ema": EMA}, "bn", axis=0),
        ("along axis 0", "all of them, (1, 3)"),
    ),
    "haiku-dimensions": Broken(
        lambda: convert.from_haiku(
            {},
            {
                "bn/~/mean_ema": {**EMA, "hidden": np.zeros(4)},
                "bn/~/var_ema": {**EMA, "counter": np.ones(1, np.int32)},
            },
            "bn",
            axis=1,
        ),
        ("bn/~/mean_ema/hidden (4,), where bn/~/mean_ema/average has (3,)", "bn/~/var_ema/counter (1,)"),
    ),
    "to-haiku-axis": Broken(
        lambda: convert.to_haiku(*functional(), "bn", ndim=4, decay_rate=0.9, axis=(1, 2)), ("(3,) among 4", "(1, 2)")
    ),
    "to-haiku-decay": Broken(lambda: convert.to_haiku(*functional(), "bn", ndim=4, decay_rate=1.0), ("[0, 1)", "1.0")),
    "linen": Broken(
        lambda: convert.from_linen({"params": {"kernel": np.ones(3)}, "batch_stats": {"mean": np.zeros(3)}}),
        ("missing: batch_stats/var", "unexpected: params/kernel"),
    ),
    "nnx": Broken(
        lambda: convert.from_nnx(nnx.LayerNorm(3, rngs=nnx.Rngs(0))), ("LayerNorm is not", "missing: mean, var")
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
def test_message_names_all_that_is_wrong(broken):
    with pytest.raises(ValueError, match=re.escape(broken.says[0])) as error:
        broken.run()
    for part in broken.says[1:]:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("package", [nnx, jaxbn.nnx], ids=["flax", "ours"])
def test_nnx_module_is_unchanged_by_what_it_cannot_hold(package):
    module = package.BatchNorm(3, use_bias=False, rngs=nnx.Rngs(0))
    before = flat(nnx.state(module))
    with pytest.raises(ValueError, match="nothing was changed") as error:
        convert.to_nnx(module, *jaxbn.bn_init(4, scale=None, mean=1.0))
    for part in ("they lack: scale", "it lacks, and they have: bias", "mean (4,), where", "var (4,), where", "(3,)"):
        assert part in str(error.value)
    assert_same(flat(nnx.state(module)), before)


def test_equinox_is_unchanged_by_what_it_cannot_hold_and_by_what_it_can():
    layer = Equinox("batch")
    before = layer.arrays()
    with pytest.raises(ValueError, match="nothing was changed") as error:
        convert.to_equinox(layer.layer, layer.state, *jaxbn.bn_init(4, bias=None))
    for part in ("they lack: bias", "mean (4,), where", "scale (4,), where", "(3,)"):
        assert part in str(error.value)
    convert.to_equinox(layer.layer, layer.state, *jaxbn.bn_init(3, mean=1.0))
    assert_same(layer.arrays(), before)  # reading a state that `set` has used up raises
    with pytest.raises(ValueError, match="must hold the statistics of `layer`"):
        convert.from_equinox(layer.layer, layer.state.substate(()))
