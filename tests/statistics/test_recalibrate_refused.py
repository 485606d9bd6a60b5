"""Refuse models and calls whose statistics cannot be made from moments."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from two_layers import (
    EVEN,
    FEATURES,
    UNEVEN,
    Linen,
    X,
    initial,
    recalibrate_linen,
    recalibrate_nnx,
)

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.statistics import pool_batches


def made(model, x):
    """Variables of which only the shapes matter."""
    return jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), jax.eval_shape(model.init, jax.random.key(0), x))


def test_models_and_calls_that_are_refused():
    with pytest.raises(ValueError, match="has none"):
        recalibrate_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), EVEN)
    with pytest.raises(TypeError, match=r"`batches` must be an iterable of batches; got an array"):
        recalibrate_nnx(jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)), X)
    with pytest.raises(ValueError, match="may be frozen"):
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
    for nothing in (lambda x: x, lambda x: None, lambda x: {}):
        with pytest.raises(TypeError, match="`moments_of` must return `Moments`"):
            pool_batches(nothing, EVEN)
    with pytest.raises(TypeError, match="batch 1 has another"):
        pool_batches(lambda x: {str(len(x)): jaxbn.moments(x)}, UNEVEN)
    with pytest.raises(TypeError, match="batch 1 has another"):
        pool_batches(jaxbn.moments, [X, X[:, :1]])


class Behind(nn.Module):
    """A normalization, and another kind of layer after it that the call may leave out."""

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
            with pytest.raises(ValueError, match=r"got '(other|the layer|input_norm)"):
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
