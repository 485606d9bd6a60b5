"""Compare, pickle and compile the settings of modules as values, and take every option of the functions."""

import inspect
import pickle
from functools import partial
from typing import Any, TypeVar, get_args, get_overloads, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import KEY, STATS, X, norm, rngs
from params import named, pairs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


FACTORIES = {
    "zero_debiased": lambda: jaxbn.zero_debiased(0.9),
    "renorm_warmup": lambda: jaxbn.renorm_warmup(start=3, r_end=np.int64(9), d_end=7),
    "renorm_warmup of arrays": lambda: jaxbn.renorm_warmup(jnp.float32(2), np.float32(1)),
    "cumulative_average": lambda: jaxbn.cumulative_average,
    "Renorm": lambda: jaxbn.Renorm(2.0, 1.0),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_equal_settings_are_equal_hash_equal_and_pickle(name):
    one, other = FACTORIES[name](), FACTORIES[name]()
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one


def test_other_settings_differ():
    assert jaxbn.zero_debiased(0.9) != jaxbn.zero_debiased(0.8)
    assert jaxbn.renorm_warmup() != jaxbn.renorm_warmup(2.0)


@pytest.mark.parametrize("options", [{"momentum": "zero_debiased"}, {"renorm": "renorm_warmup"}], ids=str)
def test_equal_models_are_one_program_one_tree_and_pickle(options):
    def make():
        return norm(**{option: FACTORIES[factory]() for option, factory in options.items()})

    traces = []

    @nnx.jit
    def step(layer, x):
        traces.append(1)
        return layer(x)

    for layer in (make(), make(), make()):
        step(layer, X)
    assert len(traces) == 1
    jax.tree.map(lambda a, b: None, make(), make())
    again = pickle.loads(pickle.dumps(make()))
    np.testing.assert_array_equal(again(X), make()(X))
    linen = [jaxbn.linen.BatchNorm(**{k: FACTORIES[f]() for k, f in options.items()}) for _ in range(2)]
    assert linen[0] == linen[1]
    assert hash(linen[0]) == hash(pickle.loads(pickle.dumps(linen[1])))


def test_every_option_of_the_function_is_in_both_modules():
    options = {p.name for p in inspect.signature(jaxbn.bn_apply).parameters.values()} - {"params", "state", "train"}
    whitening = {p.name for p in inspect.signature(jaxbn.whitening.whiten_apply).parameters.values()} - {
        "params",
        "state",
        "train",
    }
    for wanted, kinds in (
        (options, (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm)),
        (whitening, (jaxbn.linen.IterNorm, jaxbn.nnx.IterNorm)),
    ):
        for kind in kinds:
            made, called = (set(inspect.signature(f).parameters) for f in (kind.__init__, kind.__call__))
            assert wanted <= made | called, kind


UPDATES = {"no": False, "traced no": jnp.array(False), "yes": True, "traced yes": jnp.array(True)}


@pairs("update, kind", named(*UPDATES), named("BatchNorm", "IterNorm", "domains"))
def test_update_at_the_call(kind, update):
    call: dict[str, Any] = {"domain": 1} if kind == "domains" else {}
    options: dict[str, Any] = {"num_domains": 2} if kind == "domains" else {}
    name = "IterNorm" if kind == "IterNorm" else "BatchNorm"
    layer = getattr(jaxbn.nnx, name)(3, **options, rngs=rngs())
    linen = getattr(jaxbn.linen, name)(use_running_average=False, **options)
    variables = linen.init(KEY, X, **call)
    wanted = layer(X, update=True, **call)
    for y in (
        getattr(jaxbn.nnx, name)(3, **options, rngs=rngs())(X, update=UPDATES[update], **call),
        linen.apply(variables, X, update=UPDATES[update], **call, mutable=STATS)[0],
    ):
        np.testing.assert_allclose(y, wanted, atol=1e-6)
    layer = getattr(jaxbn.nnx, name)(3, **options, rngs=rngs())
    layer(X, update=UPDATES[update], **call)
    moved = bool(np.any(layer.mean[...] != 0))
    stats = linen.apply(variables, X, update=UPDATES[update], **call, mutable=STATS)[1]["batch_stats"]
    assert moved == bool(np.any(stats["mean"] != 0)) == ("yes" in update)


def test_recalibration_leaves_out_calls_without_an_update():
    """Two uses of a layer, the second with `update=False`: the statistics are those of the first."""
    layer = norm()
    jaxbn.nnx.recalibrate(layer, [X], lambda m, x: (m(x), m(5 * x, update=False)))
    np.testing.assert_allclose(layer.mean[...], X.mean(0), rtol=1e-5)
    linen = jaxbn.linen.BatchNorm()

    def apply(variables, x):
        def both(module, x):
            return module(x, True), module(5 * x, True, update=False)

        return linen.apply(variables, x, method=both, mutable=STATS)

    new = jaxbn.linen.recalibrate(apply, linen.init(KEY, X, True), [X])
    np.testing.assert_allclose(new["batch_stats"]["mean"], X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", [jnp.array, np.array, np.float32])
def test_an_array_as_epsilon(kind):
    """The number that it is: under jit too, where flax takes it."""
    for make in (nnx.BatchNorm, jaxbn.nnx.BatchNorm, partial(jaxbn.nnx.IterNorm, iterations=15)):
        layer = make(3, epsilon=kind(0.5), rngs=rngs())
        plain = make(3, epsilon=0.5, rngs=rngs())
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, X), plain(X), atol=1e-6)
    cell = jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, epsilon=kind(0.5), rngs=rngs())
    nnx.jit(lambda cell, x: cell(cell.initialize_carry((8, 3)), x)[1])(cell, X)
    layer = jaxbn.linen.BatchNorm(use_running_average=False, epsilon=kind(0.5))
    variables = layer.init(KEY, X)
    jax.jit(lambda v, x: layer.apply(v, x, mutable=STATS))(variables, X)


def test_a_model_is_converted_to_its_own_type():
    """Type checkers see that the type given is the type returned, and a layer becomes one of the class `to`."""
    for function, name in (
        (jaxbn.nnx.fold, "model"),
        (jaxbn.linen.convert, "variables"),
        (jaxbn.linen.fold, "variables"),
        (jaxbn.linen.recalibrate, "variables"),
    ):
        hints = get_type_hints(function)
        assert isinstance(hints["return"], TypeVar)
        assert hints["return"] is hints[name]
    layer, to, model = map(get_type_hints, get_overloads(jaxbn.nnx.convert))
    assert layer["return"] is jaxbn.nnx.BatchNorm
    assert get_args(to["to"]) == (to["return"],)
    assert model["return"] is model["model"]
