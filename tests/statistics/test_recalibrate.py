"""Recalibration: the moments of all data, however they come in batches, in functions, linen and nnx."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import EPSILON, training
from ways import AXIS, ONE, WAYS, mesh_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import Moments
from jaxbn.linen import recalibrate as recalibrate_linen
from jaxbn.nnx import recalibrate as recalibrate_nnx
from jaxbn.statistics import pool_batches

ROWS, FEATURES = 24, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, FEATURES)) * [0.5, 2, 8] + [0, 3, -5]).astype(np.float32)
W = [rng.standard_normal((FEATURES, 4)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)]
MASK = (np.arange(ROWS) % 5 != 2)[:, None]
HIDDEN = np.where(MASK, X, np.nan).astype(np.float32)
EVEN = [X[:8], X[8:16], X[16:]]
UNEVEN = [X[20:24], X[:16], X[16:20]]
# Sums of a few dozen float32 products and squares.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


# The float64 reference: two layers `norm(x @ w)` with a ReLU between them.


def once(batches, masks=None):
    """Mean and variance of both layers, each batch normalized by its own."""
    first = [x.astype(np.float64) @ W[0] for x in batches]
    masks = [np.ones((len(x), 1), bool) for x in batches] if masks is None else masks
    units = [training(h, mask=mask).y for h, mask in zip(first, masks, strict=True)]
    return _statistics(first, units, masks)


def by_layers(batches, masks=None):
    """Mean and variance of both layers, the second after normalization by the first's."""
    masks = [np.ones((len(x), 1), bool) for x in batches] if masks is None else masks
    first = [x.astype(np.float64) @ W[0] for x in batches]
    _, mean, var, _ = training(np.concatenate(first), mask=np.concatenate(masks))
    return _statistics(first, [(h - mean) / np.sqrt(var + EPSILON) for h in first], masks)


def _statistics(first, units, masks):
    second = [np.maximum(u, 0) @ W[1] for u in units]
    found = [training(np.concatenate(h), mask=np.concatenate(masks)) for h in (first, second)]
    return [v for f in found for v in (f.mean, f.var)]


# The same network four times.


class Linen(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, mask=None):
        x = self.norm(name="first")(x @ W[0], mask=mask)
        return self.norm(name="second")(nn.relu(x) @ W[1], mask=mask)


class Stateful(nnx.Module):
    def __init__(self, norm):
        self.first, self.second = norm(4, rngs=nnx.Rngs(0)), norm(2, rngs=nnx.Rngs(0))

    def __call__(self, x, mask=None):
        return self.second(nnx.relu(self.first(x @ W[0], mask=mask)) @ W[1], mask=mask)


@cache
def initial():
    return Linen(partial(nn.BatchNorm, use_running_average=True)).init(jax.random.key(0), X)


def of_linen(norm, batches, train=True, **options):
    model = Linen(partial(norm, use_running_average=not train))
    apply = partial(model.apply, mutable=["batch_stats"])
    variables = initial()
    new = recalibrate_linen(lambda v, batch: apply(v, *_pair(batch)), variables, batches, **options)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    stats = new["batch_stats"]
    return [stats[name][part] for name in ("first", "second") for part in ("mean", "var")]


def of_nnx(norm, batches, train=True, **options):
    model = Stateful(norm)
    model.set_attributes(use_running_average=not train)
    kinds = jax.tree.structure(nnx.state(model))
    assert recalibrate_nnx(model, batches, lambda m, batch: m(*_pair(batch)), **options) is None
    assert jax.tree.structure(nnx.state(model)) == kinds
    assert type(model.first) is norm
    return [getattr(layer, part)[...] for layer in (model.first, model.second) for part in ("mean", "var")]


def _pair(batch):
    return batch if isinstance(batch, tuple) else (batch,)


OURS = [partial(of_linen, jaxbn.linen.BatchNorm), partial(of_nnx, jaxbn.nnx.BatchNorm)]
KINDS = [*OURS, partial(of_linen, nn.BatchNorm), partial(of_nnx, nnx.BatchNorm)]
every_kind = pytest.mark.parametrize("of", KINDS, ids=["linen", "nnx", "flax-linen", "flax-nnx"])
our_kinds = pytest.mark.parametrize("of", OURS, ids=["linen", "nnx"])


def assert_statistics(got, wanted, **tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


# The function.


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.permutations(range(20)), st.permutations([1, 1, 1, 2, 2, 3, 5, 5]), st.sampled_from([0.0, 1e2, 1e4]))
def test_however_they_are_split(order, sizes, ratio):
    """As the float64 moments of all values, and with the digits of the mean that float32 has no place for."""
    x = (rng.standard_normal((20, 2)) + ratio).astype(np.float32)
    batches = np.split(x[np.array(order)], np.cumsum(sizes)[:-1])
    m = pool_batches(jax.jit(jaxbn.moments), iter(batches))
    exact = training(x)
    np.testing.assert_array_equal(m.count, exact.count)
    # Each batch's mean is good to a rounding of what it sums, in standard deviations; and so the pooled variance.
    np.testing.assert_allclose(np.asarray(m.mean, np.float64) + np.asarray(m.tail), exact.mean, rtol=1e-10, atol=1e-6)
    np.testing.assert_allclose(m.var, exact.var, rtol=1e-6)


def test_a_long_stream_does_not_drift():
    """In float32, counts of 2^24 stop growing, and thousands of roundings show."""
    x = rng.standard_normal(3000) + 100
    n = 2.0**21 + 1
    m = pool_batches(lambda v: Moments(np.float32(n), np.array([v], np.float32), np.float32(0)), x)
    x = x.astype(np.float32).astype(np.float64)
    # One rounding to float32.
    np.testing.assert_allclose(m.count, n * len(x), rtol=1e-7)
    np.testing.assert_allclose(m.mean, [x.mean()], rtol=1e-7)
    np.testing.assert_allclose(m.var, [x.var()], rtol=1e-7)


def test_trees_and_features_without_values():
    masks = [np.array([[True, False]] * 4), np.array([[False, False]] * 4), np.array([[True, False]] * 4)]
    batches = list(zip([X[:4, :2], np.full((4, 2), np.nan, np.float32), X[4:8, :2]], masks, strict=True))
    m = pool_batches(lambda b: {"a": [jaxbn.moments(b[0], mask=b[1])], "b": None}, batches)["a"][0]
    np.testing.assert_array_equal(m.count, [8, 0])
    np.testing.assert_allclose(m.var, [X[:8, 0].var(), 0], rtol=1e-6)
    np.testing.assert_array_equal(m.mean[1:], 0)


def test_of_functions_with_momentum_zero():
    """The recipe of the docstring: new states are moments."""
    params, state = jaxbn.bn_init(FEATURES)

    @jax.jit
    def moments_of(x):
        _, new = jaxbn.bn_apply(params, state, x, True, momentum=0.0)
        return Moments(len(x), new.mean, new.var)

    new = pool_batches(moments_of, UNEVEN)
    np.testing.assert_allclose(new.mean, X.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(new.var, X.astype(np.float64).var(0), rtol=1e-6)


def test_progress(capsys):
    pool_batches(jaxbn.moments, EVEN, progress=True)
    pool_batches(jaxbn.moments, iter(EVEN), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3 batches, 0 s left" in err
    assert "\r3 batches" in err
    assert err.count("\n") == 2


# Networks.


@every_kind
def test_all_at_once(of):
    """The first layer gets the moments of all data, however split; the second those of what it saw."""
    assert_statistics(of(EVEN), once(EVEN))
    assert_statistics(of(iter(UNEVEN[::-1])), once(UNEVEN))
    np.testing.assert_allclose(once(EVEN)[:2], once(UNEVEN)[:2])
    # The variance between batches is a fifth of the whole: an average of variances would not pass.
    assert np.max(np.var([(x @ W[0]).mean(0) for x in UNEVEN], 0) / once(EVEN)[1]) > 0.1


@cache
def uneven_by_layers(of):
    return of(UNEVEN, layer_by_layer=True)


@every_kind
def test_layer_by_layer(of):
    assert_statistics(uneven_by_layers(of), by_layers([X]))
    # And it is not what one pass gives.
    assert np.max(np.abs(once(UNEVEN)[3] / by_layers([X])[3] - 1)) > 0.01


@pytest.mark.parametrize("of", [OURS[0], pytest.param(OURS[1], marks=pytest.mark.slow)], ids=["linen", "nnx"])
def test_layer_by_layer_however_they_are_split(of):
    """To a millionth of a standard deviation, the deeper layer too; all at once that one depends on the split."""
    even, uneven = of(EVEN, layer_by_layer=True), uneven_by_layers(of)
    for i in (0, 2):
        std = np.sqrt(even[i + 1])
        assert np.max(np.abs(uneven[i] - even[i]) / std) < 1e-6
        assert np.max(np.abs(np.sqrt(uneven[i + 1]) - std) / std) < 1e-6
    assert np.max(np.abs(once(UNEVEN)[3] / once(EVEN)[3] - 1)) > 0.01


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_masks_over_nan_in_either_mode_of_the_call(of, layer_by_layer):
    halves = slice(0, 12), slice(12, 24)
    exact = by_layers if layer_by_layer else once
    wanted = exact([X[at] for at in halves], [MASK[at] for at in halves])
    batches = [(HIDDEN[at], MASK[at]) for at in halves]
    assert_statistics(of(batches, layer_by_layer=layer_by_layer, train=False), wanted)


class Weighted(nn.Module):
    """A network with weights: dense, normalization, ReLU, dense, normalization."""

    @nn.compact
    def __call__(self, x):
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=True)
        x = norm(name="first")(nn.Dense(4, name="a")(x))
        return norm(name="second")(nn.Dense(2, name="b")(nn.relu(x)))


def of_weights(a, first, b):
    """Return the statistics of such a network in float64, all data at once."""
    a, first, b = ({k: np.asarray(v, np.float64) for k, v in part.items()} for part in (a, first, b))
    h = training(X @ a["kernel"] + a["bias"], first["scale"], first["bias"])
    second = training(np.maximum(h.y, 0) @ b["kernel"] + b["bias"])
    return [h.mean, h.var, second.mean, second.var]


def made(model, x):
    """Variables of which only the shapes matter."""
    return jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), jax.eval_shape(model.init, jax.random.key(0), x))


def random_weights(seed):
    """Kernels, scales and biases."""
    params = made(Weighted(), X)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(random.normal(0.3, 1, v.shape), v.dtype), params)


@pytest.mark.slow
def test_averaged_weights():
    """Statistics of the average of two networks, which neither has, nor their average."""
    model, parts = Weighted(), ("a", "first", "b")
    variables = made(model, X)
    one, other = random_weights(1), random_weights(2)
    averaged = jax.tree.map(lambda v, w: 0.7 * v + 0.3 * w, one, other)
    stats = [of_weights(*(weights[part] for part in parts)) for weights in (one, other, averaged)]
    for stale in (stats[0], stats[1], [0.7 * v + 0.3 * w for v, w in zip(*stats[:2], strict=True)]):
        # In standard deviations, which would show in every output.
        assert np.max(np.abs(stale[2] - stats[2][2]) / np.sqrt(stats[2][3])) > 0.1
    apply = partial(model.apply, mutable=["batch_stats"])
    new = recalibrate_linen(apply, {**variables, "params": averaged}, EVEN, layer_by_layer=True)
    got = [new["batch_stats"][name][part] for name in ("first", "second") for part in ("mean", "var")]
    assert_statistics(got, stats[2])
    jax.tree.map(np.testing.assert_array_equal, new["params"], averaged)

    rngs = nnx.Rngs(0)
    norms = jaxbn.nnx.BatchNorm(4, rngs=rngs), jaxbn.nnx.BatchNorm(2, rngs=rngs)
    stateful = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), norms[0], nnx.relu, nnx.Linear(4, 2, rngs=rngs), norms[1])
    for layer, part in zip((stateful.layers[0], norms[0], stateful.layers[3]), parts, strict=True):
        for name, value in averaged[part].items():
            getattr(layer, name).set_value(value)
    recalibrate_nnx(stateful, [X])
    assert_statistics([getattr(norm, part)[...] for norm in norms for part in ("mean", "var")], stats[2])


@our_kinds
@pytest.mark.parametrize("source_weight", [0.0, 8.0, np.inf])
def test_source_weight_counts_examples(of, source_weight):
    """Of 24 examples: with 8 from the source, a quarter of it, which has mean 0 and variance 1."""
    share = {0.0: 0.0, 8.0: 0.25, np.inf: 1.0}[source_weight]
    wanted = [(1 - share) * v + share * (i % 2) for i, v in enumerate(once(EVEN))]
    assert_statistics(of(EVEN, source_weight=source_weight), wanted)


@pytest.mark.slow
def test_count_goes_on_from_the_batches():
    for before, after in ((0, 3), (2, 3), (9, 9)):
        layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=jaxbn.cumulative_average)
        variables = jaxbn.linen.convert(layer.init(jax.random.key(0), X), count=before)
        new = recalibrate_linen(partial(layer.apply, mutable=["batch_stats"]), variables, EVEN)
        assert int(new["batch_stats"]["count"]) == after
        stateful = jaxbn.nnx.BatchNorm(FEATURES, momentum=jaxbn.cumulative_average, rngs=nnx.Rngs(0))
        stateful.count.set_value(jnp.array(before))
        recalibrate_nnx(stateful, EVEN)
        assert int(stateful.count[...]) == after
        np.testing.assert_array_equal(stateful.mean[...], new["batch_stats"]["mean"])


class Odd(nn.Module):
    """Nested, shared, frozen, unused, and one that normalizes what a subclass makes of its input."""

    @nn.compact
    def __call__(self, x):
        shared = Doubling(use_running_average=True, name="shared")
        frozen = jaxbn.linen.BatchNorm(frozen=True, name="frozen")
        if self.is_initializing():
            jaxbn.linen.BatchNorm(use_running_average=True, name="unused")(x)
        y = shared(x) + shared(x + 10)
        return nn.remat(Inner)(name="inner")(x), y, frozen(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class Doubling(jaxbn.linen.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


class StatefulOdd(nnx.Module):
    def __init__(self):
        self.shared = StatefulDoubling(FEATURES, rngs=nnx.Rngs(0))
        self.again = nnx.List([self.shared])
        self.frozen = jaxbn.nnx.BatchNorm(FEATURES, frozen=True, rngs=nnx.Rngs(0))
        self.unused = jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
        self.inner = nnx.Dict(norm=nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return (
            self.shared(x) + self.again[0](x + 10),
            self.frozen(x),
            nnx.remat(lambda m, x: m(x))(self.inner["norm"], x),
        )


class StatefulDoubling(jaxbn.nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


@pytest.mark.slow
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_nested_shared_frozen_unused_and_subclassed(layer_by_layer):
    model, stateful = Odd(), StatefulOdd()
    variables = model.init(jax.random.key(0), X)
    apply = partial(model.apply, mutable=["batch_stats"])
    stats = recalibrate_linen(apply, variables, UNEVEN, layer_by_layer=layer_by_layer)["batch_stats"]
    recalibrate_nnx(stateful, UNEVEN, layer_by_layer=layer_by_layer)
    both = 2 * np.concatenate([X, X + 10]).astype(np.float64)
    for mean, var in (
        (stats["shared"]["mean"], stats["shared"]["var"]),
        (stateful.shared.mean[...], stateful.shared.var[...]),
    ):
        np.testing.assert_allclose(mean, both.mean(0), rtol=1e-6)
        np.testing.assert_allclose(var, both.var(0), rtol=1e-6)
    for norm in (stats["inner"]["norm"], nnx.to_pure_dict(nnx.state(stateful.inner["norm"], nnx.BatchStat))):
        np.testing.assert_allclose(norm["mean"], X.mean(0, np.float64), rtol=1e-6)
    for name in ("frozen", "unused"):
        np.testing.assert_array_equal(stats[name]["var"], 1)
        np.testing.assert_array_equal(getattr(stateful, name).var[...], 1)


@pytest.mark.slow
def test_layers_stacked_by_scan():
    """Each of a stack is a layer of its own, layer by layer too: eight passes at most, exact after three."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = jaxbn.linen.BatchNorm(use_running_average=False)(jnp.sin(x))
            return nn.BatchNorm(use_running_average=False)(x * x), None

    stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)()
    variables = stack.init(jax.random.key(0), X, None)
    apply = lambda v, x: stack.apply(v, x, None, mutable=["batch_stats"])  # noqa: E731
    stats = recalibrate_linen(apply, variables, UNEVEN, layer_by_layer=True)["batch_stats"]
    h = X.astype(np.float64)
    for i in range(2):
        for name, before in (("BatchNorm_0", np.sin), ("BatchNorm_1", np.square)):
            h, mean, var, _ = training(before(h))
            # Where features have a variance of 0.01 or more, errors of the inputs are enlarged up to 10 times a layer.
            np.testing.assert_allclose(stats[name]["mean"][i], mean, rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(stats[name]["var"][i], var, rtol=2e-5)


@pytest.mark.slow
def test_layers_stacked_by_vmap():
    stack = nnx.vmap(lambda key: jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )

    def call(stack, x):
        return nnx.scan(lambda x, layer: layer(2 * jnp.sin(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    recalibrate_nnx(stack, UNEVEN, call, layer_by_layer=True)
    h = X.astype(np.float64)
    for i in range(3):
        h, mean, var, _ = training(2 * np.sin(h))
        np.testing.assert_allclose(stack.mean[...][i], mean, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(stack.var[...][i], var, rtol=2e-5)


@pytest.mark.parametrize("norm", [nn.remat(jaxbn.linen.BatchNorm), partial(nn.BatchNorm, axis=(0, 2))])
def test_transformed_layers_and_several_axes(norm):
    model, x = norm(use_running_average=True), X.reshape(2, 12, 3)
    new = recalibrate_linen(partial(model.apply, mutable=["batch_stats"]), model.init(jax.random.key(0), x), [x])
    kept = (0, 1) if model.axis == -1 else 1
    np.testing.assert_allclose(new["batch_stats"]["var"], x.astype(np.float64).var(kept), rtol=1e-6)


def test_dropout_advances_and_the_model_keeps_its_keys():
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))
    recalibrate_nnx(model, [X, X])
    twice = model.layers[1].mean[...]
    assert int(model.layers[0].rngs.count[...]) == 0
    recalibrate_nnx(model, [X])
    assert np.max(np.abs(twice - model.layers[1].mean[...])) > 0.01  # the second batch was dropped otherwise
    model.eval()
    recalibrate_nnx(model, [X])
    np.testing.assert_allclose(model.layers[1].mean[...], X.mean(0), rtol=1e-5, atol=1e-6)


# Compiled calls and many devices.


@pytest.mark.slow
def test_calls_that_are_compiled_already():
    """A compiled call is neither taken for what it was before, nor changed for what comes after."""
    model = Linen(partial(nn.BatchNorm, use_running_average=False))
    apply = jax.jit(partial(model.apply, mutable=["batch_stats"]))
    variables = initial()
    before = apply(variables, EVEN[0])
    for layer_by_layer, wanted in ((False, once(EVEN)), (True, by_layers([X])), (False, once(EVEN))):
        new = recalibrate_linen(apply, variables, EVEN, layer_by_layer=layer_by_layer)["batch_stats"]
        assert_statistics([new["first"]["mean"], new["second"]["var"]], [wanted[0], wanted[3]])
    jax.tree.map(np.testing.assert_array_equal, apply(variables, EVEN[0]), before)

    stateful = Stateful(jaxbn.nnx.BatchNorm)
    call = nnx.jit(lambda m, x: m(x))
    call(stateful, EVEN[0])
    recalibrate_nnx(stateful, EVEN, call)
    assert_statistics([stateful.second.mean[...]], [once(EVEN)[2]])
    recalibrate_nnx(stateful, EVEN, call, layer_by_layer=True)
    assert_statistics([stateful.second.mean[...]], [by_layers([X])[2]])
    call(stateful, EVEN[0])
    assert np.max(np.abs(stateful.second.mean[...] - by_layers([X])[2])) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("way", [ONE, *WAYS], ids=lambda way: way.name)
def test_linen_on_many_devices(way):
    """With unequal masks over NaN, as on one device in float64: layer by layer, which has both modes, or at once."""
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


# Mistakes: an error, and nothing changed.


POISON = np.where(np.arange(8)[:, None] == 3, np.inf, EVEN[1]).astype(np.float32)
MISTAKES = [
    ([], {}, ValueError, "at least one batch"),
    ([X[:0]], {}, ValueError, "none of them a value"),
    ([EVEN[0], EVEN[1], POISON], {}, ValueError, r"batch 2.*first"),
    (5, {}, TypeError, "iterable"),
    (None, {"layer_by_layer": True}, TypeError, "iterable"),
    (iter(EVEN), {"layer_by_layer": True}, TypeError, "got an iterator"),
    (EVEN, {"source_weight": -1.0}, ValueError, "source_weight"),
    (EVEN, {"source_weight": "all"}, TypeError, "source_weight"),
    ([(X, MASK[:3])], {"source_weight": 1.0}, ValueError, "first axis"),
]


@our_kinds
@pytest.mark.parametrize(("batches", "options", "kind", "words"), MISTAKES)
def test_refused(of, batches, options, kind, words):
    with pytest.raises(kind, match=words):
        of(batches, **options)


def test_after_an_error_an_nnx_model_is_as_it_was():
    model = Stateful(jaxbn.nnx.BatchNorm)
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match="batch 1"):
        recalibrate_nnx(model, [EVEN[0], POISON])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    model(X)  # and it works


def test_models_and_calls_that_are_refused():
    with pytest.raises(ValueError, match="has none"):
        recalibrate_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), EVEN)
    with pytest.raises(ValueError, match="has none"):
        recalibrate_nnx(jaxbn.nnx.BatchNorm(FEATURES, frozen=True, rngs=nnx.Rngs(0)), EVEN)
    with pytest.raises(ValueError, match="has none"):
        recalibrate_linen(lambda v, x: (x, {"batch_stats": {}}), {"params": {}}, EVEN)
    with pytest.raises(ValueError, match="frozen"):
        recalibrate_nnx(jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)), EVEN, lambda m, x: x)
    model, variables = Linen(partial(jaxbn.linen.BatchNorm, use_running_average=True)), initial()
    for apply, kind, words in (
        (model.apply, ValueError, "mutable"),
        (lambda v, x: x, TypeError, "updates"),
        (lambda v, x: (x, {"batch_stats": {"first": {}}}), TypeError, "missing"),
    ):
        with pytest.raises(kind, match=words):
            recalibrate_linen(apply, variables, EVEN)

    class Own(jaxbn.linen.BatchNorm):
        @nn.compact
        def __call__(self, x):
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones)):
                self.variable("batch_stats", name, start, (FEATURES,))
            return x

    with pytest.raises(TypeError, match="Own"):
        recalibrate_linen(partial(Own().apply, mutable=["batch_stats"]), Own().init(jax.random.key(0), X), EVEN)
    with pytest.raises(TypeError, match="complex64"):
        recalibrate_nnx(jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)), [X.astype(np.complex64)])
    with pytest.raises(TypeError, match="Moments"):
        pool_batches(lambda x: x, EVEN)
    with pytest.raises(TypeError, match="batch 1 has another"):
        pool_batches(lambda x: {str(len(x)): jaxbn.moments(x)}, UNEVEN)
    with pytest.raises(TypeError, match="batch 1 has another"):
        pool_batches(jaxbn.moments, [X, X[:, :1]])


# Layers that keep other statistics.


class Behind(nn.Module):
    """A normalization, and another kind of layer behind it that the call may leave out."""

    kind: str

    @nn.compact
    def __call__(self, x, whole=True):
        x = jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(x)
        if not whole:
            return x
        if self.kind == "cell":
            cell = jaxbn.linen.BatchNormLSTMCell(2, 3, use_running_average=True, name="other")
            return cell(cell.initialize_carry(jax.random.key(0), x.shape), x)[1]
        if self.kind == "white":
            return jaxbn.linen.IterNorm(use_running_average=True, name="other")(x)
        frozen = self.kind == "frozen"
        return jaxbn.linen.BatchNorm(
            use_running_average=not frozen or None, num_domains=2, frozen=frozen, name="other"
        )(x, domain=1)


class StatefulBehind(nnx.Module):
    def __init__(self, kind):
        self.norm = jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
        if kind == "cell":
            zeros = {"kernel_init": nnx.initializers.zeros, "recurrent_kernel_init": nnx.initializers.zeros}
            self.other: nnx.Module = jaxbn.nnx.BatchNormLSTMCell(FEATURES, 2, 3, **zeros, rngs=nnx.Rngs(0))
        elif kind == "white":
            self.other = jaxbn.nnx.IterNorm(FEATURES, rngs=nnx.Rngs(0))
        else:
            self.other = jaxbn.nnx.BatchNorm(FEATURES, num_domains=2, frozen=kind == "frozen", rngs=nnx.Rngs(0))
        self.kind = kind

    def __call__(self, x, whole=True):
        x = self.norm(x)
        if not whole:
            return x
        if self.kind == "cell":
            return self.other(self.other.initialize_carry(x.shape), x)[1]
        return self.other(x) if self.kind == "white" else self.other(x, domain=1)


REFUSED = {"cell": "BatchNormLSTMCell", "white": "IterNorm", "domains": "num_domains=2"}


@pytest.mark.parametrize("kind", [*REFUSED, "frozen"])
def test_other_statistics_are_refused_or_left_alone(kind):
    """Refused where the call uses them, or the model would be half recalibrated; as they were where it does not."""
    model, stateful, x = Behind(kind), StatefulBehind(kind), [X[:8]]
    variables = made(model, X[:8])
    apply = partial(model.apply, mutable=["batch_stats"])
    before = nnx.to_pure_dict(nnx.state(stateful.other))
    whole = kind == "frozen"
    if not whole:
        for call in (lambda: recalibrate_linen(apply, variables, x), lambda: recalibrate_nnx(stateful, x)):
            with pytest.raises(ValueError, match=f"got 'other', .*{REFUSED[kind]}.*cumulative_average"):
                call()
        np.testing.assert_array_equal(stateful.norm.mean[...], 0)
        stats = variables["batch_stats"]
        alone = {**variables, "batch_stats": {"other": stats["other"]}}
        for call in (
            lambda: recalibrate_linen(lambda v, x: apply({**v, "batch_stats": stats | v["batch_stats"]}, x), alone, x),
            lambda: recalibrate_nnx(stateful.other, x),
        ):
            with pytest.raises(ValueError, match=r"got 'other|the layer"):
                call()
    new = recalibrate_linen(partial(apply, whole=whole), variables, x)["batch_stats"]
    recalibrate_nnx(stateful, x, lambda m, x: m(x, whole))
    np.testing.assert_allclose(new["norm"]["var"], X[:8].var(0), rtol=1e-5)
    np.testing.assert_allclose(stateful.norm.var[...], X[:8].var(0), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new["other"], variables["batch_stats"]["other"])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(stateful.other)), before)
    assert type(stateful.other).__module__.startswith("jaxbn")


def test_an_lstm_keeps_its_counts_when_a_model_is_converted():
    """Its normalizations are no layers that have or lack a count; but their scales and biases are such."""
    model, stateful = Behind("cell"), StatefulBehind("cell")
    variables = made(model, X[:8])
    for count in (None, 7):
        new = jaxbn.linen.convert(variables, count=count)["batch_stats"]
        jax.tree.map(np.testing.assert_array_equal, new["other"], variables["batch_stats"]["other"])
        assert ("count" in new["norm"]) == (count is not None)
    for mask in (jaxbn.linen.affine_mask(variables), nnx.to_pure_dict(jaxbn.nnx.affine_mask(stateful))):
        assert jax.tree.leaves(mask["norm"]) == [True, True]
        assert not mask["other"]["input_kernel"]
        assert all(all(mask["other"][norm].values()) for norm in ("input_norm", "recurrent_norm", "cell_norm"))
