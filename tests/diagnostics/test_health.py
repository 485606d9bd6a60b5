"""Each fault is found where it is, by its number, and nowhere else; a healthy layer is not accused."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import evaluation, training

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnostics._health import health
from jaxbn.diagnostics._report import Health
from jaxbn.linen._health import health as linen_health
from jaxbn.nnx._health import health as nnx_health

RNG = np.random.default_rng(0)
CENTRE, WIDTH = np.array([2.0, -3, 0, 5], np.float32), np.array([1.0, 4, 0.2, 2], np.float32)
X = np.asarray(RNG.normal(size=(256, 4)) * WIDTH + CENTRE, np.float32)
KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm], ids=["flax", "ours"])
NNX = pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm], ids=["flax", "ours"])


@pytest.fixture
def flax_s_promotion(ordinary_promotion):
    """What flax's layers need."""


def layer(count=100, **changes):
    """A layer that has seen a hundred batches like X."""
    params, state = jaxbn.bn_init(4, mean=CENTRE, var=WIDTH**2)
    state = state._replace(count=jnp.asarray(count, jnp.int32))
    parts = {name: jnp.asarray(v, jnp.float32) for name, v in changes.items()}
    return (
        params._replace(**{k: v for k, v in parts.items() if k in params._fields}),
        state._replace(**{k: v for k, v in parts.items() if k in state._fields}),
    )


def mixed(share):
    """Statistics that hold a share of the initial values."""
    return {"mean": (1 - share) * CENTRE, "var": share + (1 - share) * WIDTH**2}


ONE_BAD = np.where(np.arange(256)[:, None] == 7, np.float32(np.nan), X)
# The layer, the batch, the fields found, and words of each problem in their order.
CASES = {
    "healthy": (layer(), X, {}, []),
    "healthy, no batch": (layer(), None, {}, []),
    "healthy, few of them": (layer(), X[:20], {}, []),
    "no scale, no bias": ((jaxbn.BatchNormParams(None, None), layer()[1]), X, {}, []),
    "never updated": (jaxbn.bn_init(4), X, {"untouched": True, "updates": 0}, ["never updated.*mutable.*recalibrate"]),
    "never updated, but loaded": (layer(0), None, {"untouched": True}, ["never updated.*set the count"]),
    "not finite": (layer(var=[1, np.nan, np.inf, 1]), X, {"not_finite": 2}, ["2 entries.*not finite.*checkpoint"]),
    "bias not finite": (layer(bias=[1, np.nan, 1, 1]), None, {"not_finite": 1}, ["1 entries.*not finite"]),
    "scale not finite": (layer(scale=[1, np.nan, 1, 1]), X, {"not_finite": 1}, ["1 entries.*not finite"]),
    "constant": (layer(var=[1, 16, 1e-6, 4]), None, {"flat": 1}, ["1 of 4 channels.*epsilon.*dead"]),
    "not scaled": (layer(scale=[1, 1e-4, 2, -0.0]), None, {"unscaled": 2}, ["2 of 4 .*scale.*weight decay"]),
    "not scaled at all": (layer(scale=np.zeros(4)), None, {"unscaled": 4}, ["4 of 4.*residual"]),
    "small but alike": (layer(scale=1e-6 * np.ones(4)), None, {"unscaled": 0}, []),
    "too few updates": (layer(3, **mixed(0.6)), X, {}, ["hold [56][0-9]% .*momentum.*zero_debiased"]),
    "another domain": (layer(), X * 2 + 1, {}, ["not those of this batch.*weights have moved.*domain.*adapt"]),
    "another spread": (layer(), CENTRE + 3 * (X - CENTRE), {}, ["not those of this batch.*factor of up to [89]"]),
    "few examples": (layer(), X[:5], {}, ["only 5 examples.*renorm"]),
    "few that count": (layer(), X, {}, ["only 5 examples"]),
    "batch not finite": (layer(), ONE_BAD, {}, ["batch has values that are not finite"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_and_no_other(name):
    (params, state), x, fields, problems = CASES[name]
    mask = None if name != "few that count" else np.arange(256)[:, None] < 5
    (found,) = health(params, state, x, mask=mask)
    clean = {"channels": 4, "updates": 100, "untouched": False, "flat": 0, "unscaled": 0, "not_finite": 0}
    clean["updates"] = int(state.count)
    assert {k: getattr(found, k) for k in clean} == clean | fields
    assert (found.batch is None) == (x is None)
    assert len(found.problems) == len(problems), found.problems
    for problem, words in zip(found.problems, problems, strict=True):
        assert re.search(words, problem), problem


@pytest.mark.parametrize("axis", [-1, 1])
def test_gaps_are_those_of_the_definition(axis):
    """Beside the float64 oracle; with NaN under the mask."""
    x = np.asarray(RNG.normal(1, 2, (6, 4, 4)), np.float32)
    mask = RNG.random((6, 4, 4)) < 0.8
    params, state = layer(scale=[1, -2, 3, 0.5], bias=[0, 1, 2, 3])
    exact = training(x, params.scale, params.bias, axis=axis, mask=mask)
    y = evaluation(x, state.mean, state.var, params.scale, params.bias, axis=axis)
    mean, var = np.asarray(state.mean, np.float64), np.asarray(state.var, np.float64)
    wanted = [
        np.max(np.abs(exact.mean - mean) / np.sqrt(var + 1e-5)),
        np.max(np.abs(np.log((exact.var + 1e-5) / (var + 1e-5)))),
        np.max(np.abs(exact.y - y)[mask]),
    ]
    (found,) = health(params, state, np.where(mask, x, np.nan), axis=axis, mask=mask)
    assert found.batch is not None
    assert found.batch.examples == 6
    # A few roundings of float32 in each.
    np.testing.assert_allclose(found.batch[1:4], wanted, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999), share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    ratio=st.sampled_from([0.1, 1.0, 30.0]), spread=st.sampled_from([0.05, 0.5, 3.0, 100.0]),
)  # fmt: skip
def test_what_is_left_of_the_initial_values(seed, share, ratio, spread):
    """A mixture is recognized at any mean and spread, to the digits of float32; what lies beyond the batch is none."""
    rng = np.random.default_rng(seed)
    x = np.asarray(spread * (rng.normal(size=(64, 8)) + ratio * rng.normal(size=8)), np.float32)
    m = jaxbn.moments(x)
    params, state = jaxbn.bn_init(8, mean=(1 - share) * m.mean, var=share + (1 - share) * m.var)
    batch = health(params, state, x)[0].batch
    assert batch is not None
    if share == 0:
        assert batch.unlearned is None
        assert max(batch.mean, batch.var) < 1e-5
        assert batch.output < 1e-4 * max(1, ratio)
    else:
        # Relative to a difference of the statistics that may be a tenth of them, at |mean| / std of 100.
        np.testing.assert_allclose(batch.unlearned, share, rtol=1e-3)
    away = state._replace(mean=2 * m.mean, var=jnp.where(m.var < 1, m.var / 2, 2 * m.var))
    batch = health(params, away, x)[0].batch
    assert batch is not None
    assert batch.unlearned is None


def test_a_long_training_is_healthy_and_a_short_one_is_not():
    """The real thing: a momentum of 0.99 has forgotten its start after 1000 updates, not after 30."""
    params, state = jaxbn.bn_init(4)
    step = jax.jit(lambda state, x: jaxbn.bn_apply(params, state, x, True)[1])
    problems = {}
    for i in range(1000):
        state = step(state, X[i % 4 * 64 : i % 4 * 64 + 64])
        if i + 1 in (30, 1000):
            problems[i + 1] = health(params, state, X)[0].problems
    assert problems[1000] == ()
    # 0.99^30 = 74 %.
    assert re.search("hold 7[34]% of their initial values", problems[30][0])
    state = jaxbn.bn_init(4)[1]
    for i in range(4):
        state = jaxbn.bn_apply(params, state, X[i * 64 :][:64], True, momentum=jaxbn.zero_debiased(0.99))[1]
    assert health(params, state, X)[0].problems == ()


def test_the_table():
    (params, state), x = jaxbn.bn_init(4), X[:, :4]
    two = Health([*health(params, state), *health(params, state, x, name="second"), *health(*layer())])
    lines = str(two).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len({len(line) for line in lines[:4]}) == 1
    # The same words about two layers are said once.
    assert sum("never updated" in line for line in lines) == 1
    assert lines[5].startswith("the layer, second: The running")
    assert len(two.problems) == 2
    assert "No problems found" in str(health(*layer(), X))
    assert "give one" in str(health(*layer()))
    assert "give one" not in str(health(*layer(), X))


def test_what_cannot_be_looked_at():
    params, state = layer()
    stats = {"mean": state.mean, "var": state.var}
    whitened = {"mean": state.mean, "cov": np.ones((2, 2, 2), np.float32), "count": np.int32(0)}
    for call, error, words in [
        (partial(health, state, params), TypeError, "`params`.*bn_init"),
        (partial(health, params, state, X[:, :3]), ValueError, "params.scale"),
        (partial(health, params, state, np.ones((8, 4), int)), TypeError, "floating"),
        (lambda: jax.jit(lambda x: health(params, state, x)[0].flat)(X), TypeError, "traced"),
        (lambda: jax.jit(lambda state: health(params, state)[0].flat)(state), TypeError, "traced"),
        (lambda: jax.jit(lambda state: health(params, state, X)[0].flat)(state), TypeError, "traced"),
        (lambda: jax.jit(lambda v: linen_health({"batch_stats": v})[0].flat)(stats), TypeError, "traced"),
        (lambda: jax.jit(lambda v: linen_health({"batch_stats": v}))(whitened), TypeError, "traced"),
        (
            lambda: nnx.jit(lambda m: nnx_health(m)[0].flat)(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
            TypeError,
            "traced",
        ),
        (partial(linen_health, {"params": {}}), ValueError, "batch_stats"),
        (partial(linen_health, {"batch_stats": {"mean": X, "var": X}}, x=X), ValueError, "`apply` and `x`"),
        (partial(nnx_health, nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ValueError, "has none"),
    ]:
        with pytest.raises(error, match=words):
            call()


class Net(nn.Module):
    """Three normalizations, of which the second is used twice."""

    norm: Any

    @nn.compact
    def __call__(self, x, train=False):
        """Some numbers."""
        norm = partial(self.norm, use_running_average=not train, epsilon=1e-3, momentum=0.0)
        x = norm(name="first")(x)
        twice = norm(name="twice")
        x = twice(twice(nn.Dense(4, name="dense")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return norm(name="last")(x) + 1


def trained(model, *parts):
    """Variables of which only the statistics of `parts` were kept from a pass over X."""
    variables = model.init(KEY, X)
    _, new = model.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": KEY})
    kept = {name: (new if name in parts else variables)["batch_stats"][name] for name in new["batch_stats"]}
    return {**variables, "batch_stats": kept}


@BOTH
@pytest.mark.usefixtures("flax_s_promotion")
def test_linen_names_the_layer_at_fault(norm):
    """Those behind it are not blamed: they are shown what they see in training."""
    model = Net(norm)
    healthy = trained(model, "first", "twice", "last")
    for wrong in ["first", "twice", "last"]:
        variables = trained(model, *({"first", "twice", "last"} - {wrong}))
        before = jax.tree.map(np.asarray, variables)
        for apply in (model.apply, partial(model.apply, train=True, rngs={"dropout": KEY})):
            found = linen_health(variables, apply, X)
            assert {layer.path for layer in found} == {"first", "last", "twice"}
            assert {layer.path for layer in found if layer.untouched} == {wrong}
            assert all(layer.batch is not None and layer.batch.examples == 256 for layer in found)
        jax.tree.map(np.testing.assert_array_equal, variables, before)
        blamed = {layer.path for layer in linen_health(variables, model.apply, X) if layer.problems}
        # The dropout of training doubles a variance; a layer used twice has the statistics of its second use.
        assert blamed - {"last"} <= {wrong, "twice"}
        assert wrong in blamed
        assert {layer.path for layer in linen_health(variables) if layer.untouched} == {wrong}
    assert not next(layer for layer in linen_health(healthy, model.apply, X) if layer.path == "first").problems
    # An epsilon of 1e-3 is known only where the model is seen.
    small = jax.tree.map(lambda v: v * 0 + 5e-4, healthy["batch_stats"])
    assert [layer.flat for layer in linen_health({"batch_stats": small})] == [0, 0, 0]
    assert [layer.flat for layer in linen_health({"batch_stats": small}, epsilon=1e-3)] == [4, 4, 4]
    assert [layer.flat for layer in linen_health({**healthy, "batch_stats": small}, model.apply, X)] == [4, 4, 4]


@BOTH
@pytest.mark.usefixtures("flax_s_promotion")
def test_linen_stacks_and_single_layers(norm):
    """Layers of a scan are looked at without the batch; a layer by itself has no path."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return norm(use_running_average=True)(nn.Dense(4)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            x = norm(use_running_average=True, name="before")(x)
            return nn.scan(Layer, axes, split_rngs={"params": True}, length=3)(name="stack")(x, None)[0]

    model = Stack()
    before, stacked = linen_health(variables := model.init(KEY, X), model.apply, X)
    assert (before.path, before.channels, stacked.path, stacked.channels) == ("before", 4, "stack/BatchNorm_0", 12)
    assert before.batch is not None
    assert stacked.batch is None
    assert stacked.untouched
    assert len(linen_health(variables)) == 2
    alone = norm(use_running_average=True)
    (found,) = linen_health(alone.init(KEY, X), alone.apply, X)
    assert (found.path, found.untouched) == ("the layer", True)
    wanted = health(*jaxbn.bn_init(4), X)[0].batch
    assert found.batch is not None
    assert wanted is not None
    np.testing.assert_allclose(found.batch[:4], wanted[:4], rtol=1e-6)


class Model(nnx.Module):
    """As `Net`, and a stack."""

    def __init__(self, norm):
        rngs, new = nnx.Rngs(0), partial(norm, epsilon=1e-3, momentum=0.0)
        self.norms = nnx.List([new(4, rngs=rngs), new(4, rngs=rngs)])
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: norm(4, rngs=rngs))(nnx.Rngs(0).split(3))

    def __call__(self, x):
        """Some numbers."""
        x = self.norms[1](self.drop(self.dense(self.norms[0](x))))
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


@NNX
@pytest.mark.usefixtures("flax_s_promotion")
def test_nnx_names_the_layer_at_fault(norm):
    model = Model(norm)
    model(X)
    model.stack.mean.set_value(model.stack.mean[...] + 1)
    for wrong in (None, 0, 1):
        kept = nnx.clone(model)
        if wrong is not None:
            kept.norms[wrong].mean.set_value(jnp.zeros(4))
            kept.norms[wrong].var.set_value(jnp.ones(4))
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(kept, (nnx.Param, nnx.BatchStat))))
        for found in (
            nnx_health(kept),
            nnx_health(kept, X),
            nnx_health(kept, {"x": X}, lambda model, b: model(b["x"])),
        ):
            assert [layer.path for layer in found] == ["norms/0", "norms/1", "stack"]
            assert [layer.untouched for layer in found] == [wrong == 0, wrong == 1, False]
            assert found[2].channels == 12
            assert found[2].batch is None
        found = nnx_health(kept, X)
        assert found[0].batch is not None
        assert bool(found[0].problems) == (wrong == 0)
        # The model is as it was, and in training.
        after = nnx.to_pure_dict(nnx.state(kept, (nnx.Param, nnx.BatchStat)))
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert type(kept.norms[0]) is norm
        assert not kept.norms[0].use_running_average


def test_options_of_our_layers():
    """A residual and an activation stay inside; a count is read; a frozen layer is not compared."""
    rngs = nnx.Rngs(0)
    norm = jaxbn.nnx.BatchNorm(4, activation=jax.nn.relu, momentum=jaxbn.cumulative_average, rngs=rngs)
    norm(X)
    (found,) = nnx_health(norm, X, lambda model, x: model(x, residual=100 * x, mask=x[:, :1] > 0))
    assert found.batch is not None
    assert found.updates == 1
    assert found.batch.examples == np.sum(X[:, 0] > 0)
    (plain,) = nnx_health(norm, X)
    assert plain.batch is not None
    assert plain.batch.output < 1e-5
    norm.frozen = True
    assert nnx_health(norm, X)[0].batch is None
    layer = jaxbn.linen.BatchNorm(use_running_average=True, activation=jnp.tanh, frozen=True)
    assert linen_health(layer.init(KEY, X), layer.apply, X)[0].batch is None


class Conditional(nn.Module):
    """A layer whose scale and bias are given to its call, for each example, and one behind it."""

    @nn.compact
    def __call__(self, x, scale, bias):
        """Some numbers."""
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=True)
        x = norm(use_scale=False, use_bias=False, name="given")(x, scale=scale, bias=bias)
        return norm(name="last")(x)


class StatefulConditional(nnx.Module):
    """The same."""

    def __init__(self):
        self.given = jaxbn.nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        self.last = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, scale, bias):
        """Some numbers."""
        return self.last(self.given(x, scale=scale, bias=bias))


@pytest.mark.parametrize("wrong", [None, "given", "last"])
def test_a_conditional_layer_hands_on_what_it_gives_in_training(wrong):
    """What is behind it sees the call's scale and bias, and the batch's statistics, whatever the running ones are."""
    scale, bias = (np.asarray(c + RNG.uniform(0, 1, (256, 4)), np.float32) for c in (20, 7))
    behind = training(training(X).y * scale + bias)
    stats = {"given": {"mean": CENTRE, "var": WIDTH**2}, "last": {"mean": behind.mean, "var": behind.var}}
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
    """An nnx cell of four steps, in a model, with so many updates of each step; and the variables of the linen one."""
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
