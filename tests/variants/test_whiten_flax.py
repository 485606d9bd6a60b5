"""The whitening modules of linen and nnx, against the functions."""

import chex
import jax
import numpy as np
from flax import nnx
from ways import assert_close, shard_map_way
from whiten_oracle import FEATURES, ROWS, X

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.whitening import WhitenState, whiten_apply, whiten_init


def test_both_modules_are_the_function():
    """Three steps of training and one of evaluation; `train()` and `eval()` reach the nnx module."""
    options = {"momentum": 0.9, "group_size": 2, "iterations": 7}
    params, state = whiten_init(FEATURES, group_size=2)
    layer = jaxbn.linen.IterNorm(**options)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    chex.assert_trees_all_equal(variables["batch_stats"], state._asdict())
    stateful = jaxbn.nnx.IterNorm(FEATURES, rngs=nnx.Rngs(0), **options)
    for i in range(4):
        x, train = X + np.float32(i), i < 3
        wanted, state = whiten_apply(params, state, x, train, iterations=7, momentum=0.9)
        y, new = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
        variables = {**variables, **new}
        stateful.train() if train else stateful.eval()
        assert_close((y, stateful(x)), (wanted, wanted), atol=1e-4)
    assert_close(variables["batch_stats"], state._asdict(), atol=1e-4)
    assert_close(stateful.cov[...], state.cov, atol=1e-4)
    bare = jaxbn.linen.IterNorm(use_scale=False, use_bias=False).init(jax.random.key(0), X, use_running_average=True)
    assert "params" not in bare


def test_both_modules_take_masks_on_many_devices():
    """Unequal masks, NaN under them: a step of training, and with it evaluation, are the function on one device."""
    way, mask = shard_map_way(True), np.ones((ROWS, 1), bool)
    mask[3:9], mask[63] = False, False
    x = np.where(mask, X, np.nan).astype(np.float32)
    options = {"momentum": 0.9, "group_size": 2, "axis_name": way.axis_name}
    layer = jaxbn.linen.IterNorm(**options)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    graph, values = nnx.split(jaxbn.nnx.IterNorm(FEATURES, rngs=nnx.Rngs(0), **options))

    def member(whole, parts):
        of = {"mask": parts["mask"]}
        y, new = layer.apply(whole["linen"], parts["x"], False, mutable=["batch_stats"], **of)
        stateful = nnx.merge(graph, whole["nnx"])
        ys = y, stateful(parts["x"], **of)
        evaluated = layer.apply(whole["linen"] | new, parts["x"], True, **of), stateful(parts["x"], True, **of)
        kept = new["batch_stats"], {k: getattr(stateful, k)[...] for k in WhitenState._fields}
        return (ys, evaluated), kept

    got, kept = way.run(member, {"linen": variables, "nnx": values}, {"x": x, "mask": mask})
    params, state = whiten_init(FEATURES, group_size=2)
    y, state = whiten_apply(params, state, x, True, momentum=0.9, mask=mask)
    evaluated, _ = whiten_apply(params, state, x, False, mask=mask)
    assert_close((got, kept), (((y, y), (evaluated, evaluated)), (state._asdict(),) * 2), atol=1e-3)
    chex.assert_tree_all_finite(got)
