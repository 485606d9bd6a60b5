"""Recalibrate a network to the float64 moments of all data, at once and layer by layer."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import training
from two_layers import (
    EVEN,
    HIDDEN,
    MASK,
    UNEVEN,
    Linen,
    Stateful,
    W,
    X,
    assert_statistics,
    by_layers,
    initial,
    of_linen,
    of_nnx,
    once,
    recalibrate_linen,
    recalibrate_nnx,
)

import jaxbn
import jaxbn.linen
import jaxbn.nnx

OURS = [partial(of_linen, jaxbn.linen.BatchNorm), partial(of_nnx, jaxbn.nnx.BatchNorm)]
KINDS = [*OURS, partial(of_linen, nn.BatchNorm), partial(of_nnx, nnx.BatchNorm)]
every_kind = pytest.mark.parametrize("of", KINDS, ids=["linen", "nnx", "flax-linen", "flax-nnx"])
our_kinds = pytest.mark.parametrize("of", OURS, ids=["linen", "nnx"])


@every_kind
def test_all_at_once(of):
    """The first layer gets the moments of all data, however split; the second those of its inputs."""
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
    # One pass gives others.
    assert np.max(np.abs(once(UNEVEN)[3] / by_layers([X])[3] - 1)) > 0.01


@pytest.mark.parametrize("of", [OURS[0], pytest.param(OURS[1], marks=pytest.mark.slow)], ids=["linen", "nnx"])
def test_layer_by_layer_however_they_are_split(of):
    """They agree to a millionth of a standard deviation, the deeper layer too; all at once it depends on the split."""
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
    """A source worth 8 beside 24 examples is a quarter of the mixture; it has mean 0 and variance 1."""
    share = {0.0: 0.0, 8.0: 0.25, np.inf: 1.0}[source_weight]
    wanted = [(1 - share) * v + share * (i % 2) for i, v in enumerate(once(EVEN))]
    assert_statistics(of(EVEN, source_weight=source_weight), wanted)


@pytest.mark.slow
def test_calls_that_are_compiled_already():
    """A compiled call is compiled again, and serves later calls unchanged."""
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
def test_mistakes(of, batches, options, kind, words):
    with pytest.raises(kind, match=words):
        of(batches, **options)


def test_after_an_error_an_nnx_model_is_as_it_was():
    model = Stateful(jaxbn.nnx.BatchNorm)
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match="batch 1"):
        recalibrate_nnx(model, [EVEN[0], POISON])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    model(X)  # and it works
