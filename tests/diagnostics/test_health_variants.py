"""Diagnose conditional layers, LSTM cells and whitening."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import training

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnostics import health

linen_health, nnx_health = jaxbn.linen.health, jaxbn.nnx.health
RNG = np.random.default_rng(0)
CENTRE, WIDTH = np.array([2.0, -3, 0, 5], np.float32), np.array([1.0, 4, 0.2, 2], np.float32)
X = np.asarray(RNG.normal(size=(256, 4)) * WIDTH + CENTRE, np.float32)
KEY = jax.random.key(0)


class Conditional(nn.Module):
    """A layer whose scale and bias are given to its call, for each example, and one after it."""

    @nn.compact
    def __call__(self, x, scale, bias):
        """Return some numbers."""
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=True)
        x = norm(use_scale=False, use_bias=False, name="given")(x, scale=scale, bias=bias)
        return norm(name="last")(x)


class StatefulConditional(nnx.Module):
    """The same."""

    def __init__(self):
        self.given = jaxbn.nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        self.last = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, scale, bias):
        """Return some numbers."""
        return self.last(self.given(x, scale=scale, bias=bias))


@pytest.mark.parametrize("wrong", [None, "given", "last"])
def test_a_conditional_layer_outputs_its_training_values(wrong):
    """The layer after it gets the call's scale and bias with the batch's statistics, not with the running ones."""
    scale, bias = (np.asarray(c + RNG.uniform(0, 1, (256, 4)), np.float32) for c in (20, 7))
    after = training(training(X).y * scale + bias)
    stats = {"given": {"mean": CENTRE, "var": WIDTH**2}, "last": {"mean": after.mean, "var": after.var}}
    stats = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), stats)
    if wrong is not None:
        stats[wrong] = jax.tree.map(lambda v: 9 * v + 1, stats[wrong])
    ones, zeros = jnp.ones(4), jnp.zeros(4)
    variables = {"params": {"last": {"scale": ones, "bias": zeros}}, "batch_stats": stats}
    stateful = StatefulConditional()
    for name in ("given", "last"):
        getattr(stateful, name).mean.set_value(stats[name]["mean"])
        getattr(stateful, name).var.set_value(stats[name]["var"])
    for found in (
        linen_health(variables, lambda v, x: Conditional().apply(v, x, scale, bias), X),
        nnx_health(stateful, X, lambda model, x: model(x, scale, bias)),
    ):
        assert {layer.path for layer in found if layer.problems} == ({wrong} if wrong else set())
        by_path = {layer.path: layer.batch for layer in found}
        state = jaxbn.bn_init(4)[1]._replace(**stats["given"])
        wanted = health(jaxbn.BatchNormParams(jnp.asarray(scale), jnp.asarray(bias)), state, X)[0].batch
        np.testing.assert_allclose(by_path["given"][:4], wanted[:4], rtol=1e-5)


def lstm(count, **changes):
    """Make an nnx cell of four steps, in a model, with `count` updates of its steps, and the linen variables."""
    cell = jaxbn.nnx.BatchNormLSTMCell(
        2, 3, 4, epsilon=1e-3, recurrent_kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
    )
    params, stats = {}, {}
    for norm in ("input_norm", "recurrent_norm", "cell_norm"):
        own = getattr(cell, norm)
        own["count"].set_value(jnp.asarray(count, jnp.int32))
        # h starts at zero.
        rows = {"recurrent_norm": [0, 2, 2, 2]}.get(norm, [2, 2, 2, 2])
        own["var"].set_value(
            jnp.asarray(changes.get(norm, rows), jnp.float32)[:, None] * jnp.ones_like(own["var"][...])
        )
        params[norm] = {name: own[name][...] for name in ("scale", "bias") if name in own}
        stats[norm] = {name: own[name][...] for name in ("mean", "var", "count")}
    params |= {"input_kernel": cell.input_kernel[...], "recurrent_kernel": cell.recurrent_kernel[...]}
    return nnx.Dict(cell=cell), {"params": {"cell": params}, "batch_stats": {"cell": stats}}


def test_an_lstm_is_judged_by_the_steps_that_it_has_reached():
    """Later steps use the last of them; and the first product of h has no variance, and is not at fault."""
    paths = ["cell/input_norm", "cell/recurrent_norm", "cell/cell_norm"]
    for count, changes, updates, words in (
        ([9, 5, 0, 0], {}, 5, {}),
        ([9, 5, 7, 8], {}, 5, {}),
        ([0, 0, 0, 0], {}, 0, dict.fromkeys(paths, "never updated")),
        ([9, 5, 0, 0], {"recurrent_norm": [0, 0, 2, 2]}, 5, {paths[1]: "12 of 24 channels.*constant"}),
        ([9, 5, 0, 0], {"cell_norm": [0, 2, 0, 0]}, 5, {paths[2]: "3 of 6 channels.*constant"}),
    ):
        model, variables = lstm(count, **changes)
        for found in (nnx_health(model), linen_health(variables)):
            # Flax's dicts may be sorted.
            assert sorted(layer.path for layer in found) == sorted(paths)
            assert {layer.updates for layer in found} == {updates}
            assert {layer.path for layer in found if layer.untouched} == ({*paths} if updates == 0 else set())
            assert {layer.path for layer in found if layer.problems} == set(words)
            for layer in found:
                assert all(re.search(words[layer.path], problem) for problem in layer.problems)


def test_the_epsilon_of_an_lstm_is_read_off():
    model, variables = lstm([9, 9, 9, 9], cell_norm=[5e-4] * 4)
    cell = jaxbn.linen.BatchNormLSTMCell(3, 4, use_running_average=True, epsilon=1e-3)
    alone = {kind: parts["cell"] for kind, parts in variables.items()}
    carry = cell.initialize_carry(KEY, (5, 2))
    found = linen_health(alone, lambda v, x: cell.apply(v, carry, x), X[:5, :2])
    assert {layer.path: layer.flat for layer in found} == {"input_norm": 0, "recurrent_norm": 0, "cell_norm": 12}
    assert [layer.flat for layer in nnx_health(model)] == [0, 0, 12]
    assert sum(layer.flat for layer in linen_health(alone)) == 0


def test_whitening_is_judged_by_the_variances_of_its_features():
    stateful = nnx.Dict(white=jaxbn.nnx.IterNorm(4, group_size=2, epsilon=1e-3, rngs=nnx.Rngs(0)))
    white = jaxbn.linen.IterNorm(use_running_average=True, group_size=2, epsilon=1e-3)
    model = nn.Sequential([white])
    cov = np.array([[[1, 0.9], [0.9, 1]], [[2, 0], [0, 5e-4]]], np.float32)
    for count, problem in ((0, "never updated"), (3, "1 of 4 channels.*constant")):
        own = stateful["white"]
        own.count.set_value(jnp.asarray(count, jnp.int32))
        own.cov.set_value(jnp.asarray(cov if count else np.eye(2, dtype=np.float32)[None] * np.ones_like(cov)))
        stats = {"mean": own.mean[...], "cov": own.cov[...], "count": own.count[...]}
        params = {"scale": own.scale[...], "bias": own.bias[...]}
        variables = {"params": {"layers_0": params}, "batch_stats": {"layers_0": stats}}
        for found, path in (
            (nnx_health(stateful, X, lambda m, x: m["white"](x)), "white"),
            (linen_health(variables, model.apply, X), "layers_0"),
        ):
            assert (found[0].path, found[0].channels, found[0].updates) == (path, 4, count)
            assert len(found[0].problems) == 1
            assert re.search(problem, found[0].problems[0])
    assert [layer.flat for layer in linen_health(variables)] == [0]
