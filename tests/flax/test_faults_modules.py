"""Kinds of faults found from outside, in the modules and in what goes through a model, each over its places."""

import inspect
import pickle
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.errors import ModifyScopeVariableError

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx

KEY = jax.random.key(0)
X = np.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 3)), np.float32)
STATS = ["batch_stats"]
LENGTHS = np.array([4, 4, 3, 3, 2, 2, 1, 1])
SEQUENCES = np.asarray(np.random.default_rng(1).normal(size=(8, 4, 3)), np.float32)

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def rngs():
    return nnx.Rngs(0)


def norm(**options) -> Any:
    return jaxbn.nnx.BatchNorm(3, **options, rngs=rngs())


# 1. A guard that looks at what is stored.


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
def test_what_half_precision_does_not_hold_is_not_stored(place):
    """A feature whose variance is finite in float32 and not in float16 keeps its old ones; the others move."""
    mean, var = (np.asarray(v, np.float32) for v in place(X * np.array([1, 1e4, 1], np.float32)))
    assert mean.dtype == np.float32
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()
    if place is not in_lstm:
        mean, var = mean.reshape(-1, 3)[-1], var.reshape(-1, 3)[-1]
        assert (mean[1], var[1]) == (0, 1)
        assert (var[[0, 2]] != 1).all()


def test_what_a_target_does_not_hold_is_not_converted():
    target = {"batch_stats": {"bn": {"mean": np.zeros(3, np.float16), "var": np.zeros(3, np.float16)}}}
    saved = {"bn.running_mean": np.zeros(3), "bn.running_var": np.full(3, 1e6)}
    with pytest.raises(ValueError, match="float16 does not hold"):
        jaxbn.convert.from_torch_network(target, saved, {"bn": "bn"})


# 2. Docstrings that flax parses, and other ways to look at a module.


def folded():
    return jaxbn.nnx.fold(nnx.Sequential(nnx.Linear(3, 3, rngs=rngs()), norm()), {"layers/0": "layers/1"}, X)


MODULES = {
    "BatchNorm": norm,
    "schedules": lambda: norm(momentum=jaxbn.zero_debiased(0.9), renorm=jaxbn.renorm_warmup()),
    "IterNorm": lambda: jaxbn.nnx.IterNorm(3, rngs=rngs()),
    "BatchNormLSTMCell": lambda: jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, rngs=rngs()),
    "Folded": folded,
}


@pytest.mark.parametrize("name", MODULES)
def test_nnx_modules_can_be_looked_at(name, capsys):
    module: Any = MODULES[name]()
    info = nnx.view_info(module)
    assert "use_running_average: bool | None = None" in info
    assert "None\n    w" in info  # and what it says of it
    assert repr(module)
    nnx.display(module)
    assert capsys.readouterr().out
    if name != "Folded":  # folding compares numbers
        assert isinstance(nnx.eval_shape(MODULES[name]), type(module))
    if name != "BatchNormLSTMCell":  # flax's own `RNN` cannot be tabulated
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "Summary" in nnx.tabulate(module, X)


def test_linen_modules_can_be_looked_at():
    cell = jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=True)
    rnn = nn.RNN(cell, variable_broadcast=("params", "batch_stats"))
    for module, x in ((jaxbn.linen.BatchNorm(False), X), (jaxbn.linen.IterNorm(False), X), (rnn, SEQUENCES)):
        assert "batch_stats" in module.tabulate(KEY, x)


# 3. Settings are values.

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


# 6. The types of variables stay.


def in_cond(layer, x):
    return nnx.cond(jnp.array(True), lambda m, x: m(x, False), lambda m, x: m(x, True), layer, x)


def in_scan(layer, x):
    def body(layer, x):
        return layer, layer(x)

    carry = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return carry(layer, x[None])[1][0]


@pytest.mark.parametrize("how", [in_cond, in_scan, lambda layer, x: layer(x)], ids=["cond", "scan", "plain"])
@pytest.mark.parametrize("option", ["param_dtype", "dtype"])
def test_complex_layers_are_so_from_the_start(how, option):
    x, layer = (X + 1j * X[::-1]).astype(np.complex64), norm(**{option: jnp.complex64}, momentum=0.0)
    assert (layer.mean.dtype, layer.var.dtype) == (jnp.complex64, jnp.float32)
    y = how(layer, x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(np.var(x, 0) + 1e-5), atol=1e-5)


@pytest.mark.parametrize("train", [True, "traced"])
def test_a_real_mean_does_not_become_complex(train):
    x = X.astype(np.complex64)
    layer, linen = norm(), jaxbn.linen.BatchNorm()
    variables = linen.init(KEY, X, True)
    evaluate = jnp.array(False) if train == "traced" else False
    for call in (lambda: layer(x, evaluate), lambda: linen.apply(variables, x, evaluate, mutable=STATS)):
        with pytest.raises(TypeError, match="complex64"):
            call()
    for y in (layer(x, True), layer(x, False, update=False), linen.apply(variables, x, True)):
        assert y.dtype == jnp.complex64
    assert layer.mean.dtype == jnp.float32
    variables = linen.init(KEY, x, True)
    _, update = linen.apply(variables, x, False, mutable=STATS)
    chex.assert_trees_all_equal_shapes_and_dtypes(update["batch_stats"], variables["batch_stats"])


# 7. Containers.


class Held(nnx.Module):
    """Layers in a tuple."""

    def __init__(self):
        self.blocks = nnx.data((nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs())))

    def __call__(self, x):
        """One after the other."""
        return self.blocks[1](self.blocks[0](x))


class InDict(nnx.Module):
    """Layers in a tuple in a dict."""

    def __init__(self):
        self.blocks = nnx.data({"all": (nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs()))})

    def __call__(self, x):
        """One after the other."""
        return self.blocks["all"][1](self.blocks["all"][0](x))


class NoTree(nnx.Module, pytree=False):
    """A module that is no pytree, with layers in a tuple."""

    def __init__(self):
        self.blocks = (nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs()))

    def __call__(self, x):
        """One after the other."""
        return self.blocks[1](self.blocks[0](x))


class Inside(nnx.Module):
    """One inside another."""

    def __init__(self):
        self.held, self.blocks = Held(), ()

    def __call__(self, x):
        """As the inner one."""
        return self.held(x)


CONTAINERS = {"tuple": Held, "dict": InDict, "no pytree": NoTree, "inside": Inside}
PREFIX = {"tuple": "blocks", "dict": "blocks/all", "no pytree": "blocks", "inside": "held/blocks"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_whatever_holds_the_layers(name):
    """`convert`, `fold` and `health` find and replace them, and leave the model as it is."""
    model: Any = CONTAINERS[name]()
    model(X)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    converted = jaxbn.nnx.convert(model, momentum=0.5)
    norms = [m for _, m in nnx.iter_modules(converted) if isinstance(m, jaxbn.nnx.BatchNorm)]
    assert [m.momentum for m in norms] == [0.5]
    assert norms[0].mean is next(m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)).mean
    pairs = {f"{PREFIX[name]}/0": f"{PREFIX[name]}/1"}
    model.eval()
    wanted = model(X)
    for start in (model, converted):
        new = jaxbn.nnx.fold(start, pairs, X)
        assert not [m for _, m in nnx.iter_modules(new) if isinstance(m, (jaxbn.nnx.BatchNorm, nnx.BatchNorm))]
        np.testing.assert_allclose(new(X), wanted, atol=1e-5)
        assert jaxbn.nnx.health(start, X)[0].batch is not None
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.parametrize("hold", [tuple, list, lambda layers: dict(enumerate(layers)), lambda layers: [tuple(layers)]])
def test_containers_without_a_module_around(hold):
    layers = [nnx.Linear(3, 3, rngs=rngs()), nnx.BatchNorm(3, rngs=rngs())]
    model = hold(layers)
    new = jaxbn.nnx.convert(model)
    assert type(new) is type(model)
    assert [type(m) for _, m in nnx.iter_modules(new)] == [nnx.Linear, jaxbn.nnx.BatchNorm]

    def call(model, x):
        for _, layer in list(nnx.iter_modules(model)):
            if not isinstance(layer, nnx.BatchNorm):
                x = layer(x)
        return x

    found = jaxbn.nnx.health(model, X, call)
    assert found[0].batch is not None
    np.testing.assert_array_equal(layers[1].mean[...], np.zeros(3))


# 8. Tree types.


class Net(nn.Module):
    """A layer and a normalization."""

    @nn.compact
    def __call__(self, x, train=False):
        """One after the other."""
        return jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


PAIRS = {"Dense_0": "BatchNorm_0"}
THROUGH = {
    "affine_mask": lambda v: {"params": jaxbn.linen.affine_mask(v), "batch_stats": v["batch_stats"]},
    "convert": jaxbn.linen.convert,
    "fold": lambda v: jaxbn.linen.fold(Net().apply, v, PAIRS, X),
    "recalibrate": lambda v: jaxbn.linen.recalibrate(lambda v, x: Net().apply(v, x, mutable=STATS), v, [X]),
}


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.parametrize("frozen", ["all", "params", "none"])
def test_trees_keep_their_type(name, frozen):
    variables: Any = Net().init(KEY, X)
    if frozen != "none":
        variables = {**variables, "params": freeze(variables["params"])}
    if frozen == "all":
        variables = freeze(variables)
    new = THROUGH[name](variables)
    assert isinstance(new["params"], FrozenDict) == (frozen != "none")
    assert jax.tree.structure(new["params"]) == jax.tree.structure(variables["params"])
    if name != "affine_mask":
        assert jax.tree.structure(new) == jax.tree.structure(variables)
    else:
        optimizer = optax.masked(optax.set_to_zero(), new["params"])
        optimizer.update(variables["params"], optimizer.init(variables["params"]))


def test_the_mask_of_boxed_parameters_is_of_bools():
    layer = jaxbn.linen.BatchNorm(True, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    assert jaxbn.linen.affine_mask(layer.init(KEY, X)) == {"scale": True, "bias": True}


# 9. Folding, and biases with more axes than the features.


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["LinearGeneral", "DenseGeneral", "ConvLocal"])
def test_fold_where_a_bias_has_more_axes(kind, use_bias):
    init = nn.initializers.normal()
    if kind == "LinearGeneral":
        layer = nnx.LinearGeneral(3, (2, 4), use_bias=use_bias, bias_init=init, rngs=rngs())
        model = nnx.Sequential(layer, jaxbn.nnx.BatchNorm(4, rngs=rngs()))
        model(X)
        new = jaxbn.nnx.fold(model, {"layers/0": "layers/1"}, X)
        model.eval()
        np.testing.assert_allclose(new(X), model(X), atol=1e-5)
        return
    x = X if kind == "DenseGeneral" else np.asarray(np.random.default_rng(3).normal(size=(4, 6, 3)), np.float32)

    def make(use_bias, norm=True):
        made = {
            "DenseGeneral": lambda: nn.DenseGeneral((2, 4), use_bias=use_bias, bias_init=init),
            "ConvLocal": lambda: nn.ConvLocal(4, (3,), use_bias=use_bias, bias_init=init),
        }[kind]()
        return nn.Sequential([made, jaxbn.linen.BatchNorm(use_running_average=True)] if norm else [made])

    model = make(use_bias)
    variables: Any = model.init(KEY, x)
    variables["batch_stats"] = jax.tree.map(lambda v: v + 0.5, variables["batch_stats"])
    wanted = model.apply(variables, x)
    new = jaxbn.linen.fold(model.apply, variables, {"layers_0": "layers_1"}, x)
    np.testing.assert_allclose(model.apply(new, x), wanted, atol=1e-5)
    dropped = jaxbn.linen.fold(model.apply, variables, {"layers_0": "layers_1"}, x, drop=True)
    np.testing.assert_allclose(make(True, norm=False).apply(dropped, x), wanted, atol=1e-5)


def test_a_bias_of_other_features_is_refused():
    with pytest.raises(ValueError, match="`bias`"):
        jaxbn.inference.fold(*jaxbn.bn_init(4), np.ones((3, 2, 4), np.float32), np.ones((4, 2), np.float32))


# 10. Health under `vmap`, where anything may be mapped.


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
@pytest.mark.parametrize("mapped", ["params", "batch_stats", "both"])
def test_health_of_mapped_layers(norm, mapped):
    """A twin critic: the normalization gets the raw input, and of its variables some are mapped."""
    axes: Any = {"params": 0 if mapped != "batch_stats" else None, "batch_stats": 0 if mapped != "params" else None}
    twin = nn.vmap(norm, variable_axes=axes, split_rngs={"params": mapped != "batch_stats"}, in_axes=None, axis_size=2)(
        use_running_average=True
    )
    variables = twin.init(KEY, X)
    with pytest.warns(UserWarning, match="compared"):
        found = jaxbn.linen.health(variables, twin.apply, X)
    assert found[0].batch is None


def test_health_of_mapped_nnx_layers():
    layer = norm()

    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: None, nnx.BatchStat: None}), None, 0))
    def call(layer, x, scale):
        return layer(x, residual=scale * x)

    with pytest.warns(UserWarning, match="compared"):
        found = jaxbn.nnx.health(layer, X, lambda layer, x: call(layer, x, jnp.arange(2.0)))
    assert found[0].batch is None


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: jax.jit(jax.jit(f))])
def test_health_sees_into_a_compiled_function(compiled):
    """And says so where one is inside another."""
    model = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(KEY, X)
    assert jaxbn.linen.health(variables, compiled(model.apply), X)[0].batch is not None
    inner = jax.jit(model.apply)
    with pytest.warns(UserWarning, match="plain function"):
        found = jaxbn.linen.health(variables, lambda v, x: inner(v, x), X)
    assert found[0].batch is None


def test_health_sees_into_a_compiled_call():
    model = nnx.Sequential(norm())
    assert jaxbn.nnx.health(model, X, nnx.jit(lambda model, x: model(x)))[0].batch is not None


# 12. Modules have what the function has.


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


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", ["BatchNorm", "IterNorm", "domains"])
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


def test_recalibration_leaves_out_what_does_not_update():
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


# 13. Silence where flax speaks.


def layers_in_training():
    return {
        "BatchNorm": (jaxbn.linen.BatchNorm(use_running_average=False), X),
        "traced": (jaxbn.linen.BatchNorm(use_running_average=jnp.array(False)), X),
        "schedule": (jaxbn.linen.BatchNorm(use_running_average=False, momentum=jaxbn.zero_debiased(0.9)), X),
        "IterNorm": (jaxbn.linen.IterNorm(use_running_average=False), X),
        "cell": (
            nn.RNN(
                jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=False),
                variable_broadcast=("params", "batch_stats"),
            ),
            SEQUENCES,
        ),
    }


@pytest.mark.parametrize("name", ["BatchNorm", "traced", "schedule", "IterNorm", "cell"])
def test_training_that_could_not_update_is_refused_as_in_flax(name):
    layer, x = layers_in_training()[name]
    variables = layer.init(KEY, x)
    with pytest.raises(ModifyScopeVariableError):
        layer.apply(variables, x)
    if name != "cell":
        assert layer.apply(variables, x, update=False).shape == x.shape


# 15. Lengths.


def linen_rnn(train):
    how: Any = {"variable_carry": "batch_stats"} if train else {"variable_broadcast": ("params", "batch_stats")}
    return nn.RNN(jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=not train), return_carry=True, **how)


def run_linen(x, **options):
    variables = linen_rnn(False).init(KEY, SEQUENCES)
    (carry, y), update = linen_rnn(True).apply(variables, x, **options, mutable=STATS)
    return carry, y, update["batch_stats"]


def run_nnx(x, **options):
    cell = jaxbn.nnx.BatchNormLSTMCell(3, 5, max_steps=4, rngs=rngs())
    rnn = nnx.RNN(cell, return_carry=True, state_axes=nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))
    carry, y = rnn(x, **options)
    return carry, y, nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))


def begun(run, lengths):
    if run is run_linen:
        return jaxbn.linen.BatchNormLSTMCell(5, 4, False).initialize_carry(KEY, (8, 3), lengths=lengths)
    return jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, rngs=rngs()).initialize_carry((8, 3), lengths=lengths)


@pytest.mark.parametrize("run", [run_linen, run_nnx])
@pytest.mark.parametrize("how", ["plain", "compiled", "reversed"])
def test_flax_s_lengths_keep_padding_out(run, how):
    """As lengths in the carry do; NaN in the padding is nowhere."""
    real = (np.arange(4) < LENGTHS[:, None])[..., None]
    options: dict[str, Any] = {"reverse": True, "keep_order": True} if how == "reversed" else {}
    f = partial(run, **options)
    wanted = f(np.where(real, SEQUENCES, 0), initial_carry=begun(run, LENGTHS), seq_lengths=LENGTHS)
    f = jax.jit(f) if how == "compiled" else f
    got = f(jnp.where(real, SEQUENCES, jnp.nan), seq_lengths=LENGTHS)
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(got, wanted, atol=1e-6)


@pytest.mark.parametrize("run", [run_linen, run_nnx])
def test_a_carry_without_the_lengths_is_refused(run):
    with pytest.raises(ValueError, match="initial_carry"):
        run(SEQUENCES, initial_carry=begun(run, None), seq_lengths=LENGTHS)


# 16. Messages.


def test_without_flax_it_says_what_to_install():
    program = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")
sys.meta_path.insert(0, Missing())
import jaxbn
for name in ("linen", "nnx"):
    try:
        __import__("jaxbn." + name)
    except ImportError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.count("pip install jaxbn[flax]") == 2


WIDE = np.ones((8, 4), np.float32)


def linen_stats(layer):
    return layer.init(KEY, X, True)


WIDTHS = {
    "nnx BatchNorm": lambda: norm()(WIDE),
    "nnx without affine": lambda: norm(use_scale=False, use_bias=False)(WIDE),
    "nnx IterNorm": lambda: jaxbn.nnx.IterNorm(3, rngs=rngs())(WIDE),
    "nnx domains": lambda: norm(num_domains=2)(WIDE, domain=0),
    "nnx cell": lambda: run_nnx(np.ones((8, 4, 4), np.float32)),
    "linen without affine": lambda: jaxbn.linen.BatchNorm(True, use_scale=False, use_bias=False).apply(
        linen_stats(jaxbn.linen.BatchNorm(use_scale=False, use_bias=False)), WIDE
    ),
    "linen IterNorm": lambda: jaxbn.linen.IterNorm(True, use_scale=False, use_bias=False).apply(
        linen_stats(jaxbn.linen.IterNorm(use_scale=False, use_bias=False)), WIDE
    ),
    "nnx scale of the call": lambda: norm(use_scale=False)(X, scale=np.ones(4, np.float32)),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_wrong_width_advises_what_a_module_s_user_can_do(name):
    with pytest.raises(ValueError, match="must") as error:
        WIDTHS[name]()
    assert "_init(" not in str(error.value)
    assert "params." not in str(error.value)


@pytest.mark.parametrize("name", ["BatchNorm", "IterNorm"])
def test_float8_is_refused_in_words(name):
    """Unless the layer has a `dtype`, which says what to make of it."""
    x = X.astype(jnp.float8_e4m3fn)
    for call in (
        lambda **o: getattr(jaxbn.nnx, name)(3, **o, rngs=rngs())(x),
        lambda **o: getattr(jaxbn.linen, name)(use_running_average=True, **o).init_with_output(KEY, x)[0],
    ):
        with pytest.raises(TypeError, match=r"astype"):
            call()
        assert call(dtype=jnp.float32).dtype == jnp.float32


def test_a_cell_without_its_statistics_says_how():
    for train in (True, False):
        rnn = nn.RNN(jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=not train))
        with pytest.raises(ValueError, match="variable_carry"):
            rnn.init(KEY, SEQUENCES)


@pytest.mark.parametrize("option", [{"momentum": jaxbn.zero_debiased(0.9)}, {"renorm": jaxbn.renorm_warmup()}])
def test_statistics_without_a_count_are_not_replaced_silently(option):
    """Pretrained ones, at the first step of a schedule; evaluation and recalibration do without."""
    layer = jaxbn.linen.BatchNorm(**option)
    saved = {"batch_stats": {"mean": jnp.full(3, 5.0), "var": jnp.full(3, 2.0)}}
    saved["params"] = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match="count"):
        layer.apply(saved, X, False, mutable=STATS)
    for _ in range(2):
        y, update = layer.apply(saved, X, True, mutable=STATS)
        assert set(update["batch_stats"]) == {"mean", "var"}
    np.testing.assert_allclose(y, (X - 5) / np.sqrt(2 + 1e-5), rtol=1e-4)
    new = jaxbn.linen.recalibrate(lambda v, x: layer.apply(v, x, True, mutable=STATS), saved, [X])
    np.testing.assert_allclose(new["batch_stats"]["mean"], X.mean(0), rtol=1e-5)
    counted = jaxbn.linen.convert(saved, count=100)
    layer.apply(counted, X, False, mutable=STATS)
    trained = nnx.BatchNorm(3, rngs=rngs())
    trained(X)
    with pytest.warns(UserWarning, match="count"):
        jaxbn.nnx.convert(trained, **option)


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


# 25. Several processes.

MANY = """
import sys, jax, numpy as np
port, me = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, me)
from flax import nnx
import flax.linen as nn
import jax.numpy as jnp, jaxbn.nnx, jaxbn.linen
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = np.random.default_rng(0).normal(2, 3, size=(16, 3)).astype(np.float32)
x = jax.make_array_from_callback(rows.shape, jax.NamedSharding(mesh, jax.P("data")), lambda i: rows[i])
assert not x.is_fully_addressable
model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
found = jaxbn.nnx.health(model, x)
jaxbn.nnx.recalibrate(model, [x])
new = jaxbn.nnx.fold(model, {"layers/0": "layers/1"}, x)
linen = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
variables = linen.init(jax.random.key(0), rows)
also = jaxbn.linen.health(variables, linen.apply, x)
jaxbn.linen.fold(linen.apply, variables, {"layers_0": "layers_1"}, x)
print("RESULT", found[0].batch.examples, round(found[0].batch.mean, 3), also[0].batch.examples)
"""


@pytest.mark.slow
def test_a_batch_over_several_processes():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", MANY, str(port)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ran = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    outs = [process.communicate(timeout=240) for process in ran]
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs()), norm())
    x = np.random.default_rng(0).normal(2, 3, size=(16, 3)).astype(np.float32)
    alone = jaxbn.nnx.health(model, x)[0].batch
    for out, err in outs:
        line = [line for line in out.splitlines() if line.startswith("RESULT")]
        assert line, err[-3000:]
        _, examples, mean, also = line[0].split()
        assert (examples, also) == ("16", "16")
        assert float(mean) == pytest.approx(alone.mean, abs=2e-3)


# 26. Converters.

NOT_A_LAYER = {
    "from_torch": lambda v: jaxbn.convert.from_torch(v),
    "to_torch": lambda v: jaxbn.convert.to_torch(v, v),
    "from_keras": lambda v: jaxbn.convert.from_keras(v),
    "to_keras": lambda v: jaxbn.convert.to_keras(v, v),
    "from_linen": lambda v: jaxbn.convert.from_linen(v),
    "to_linen": lambda v: jaxbn.convert.to_linen(v, v),
    "from_nnx": lambda v: jaxbn.convert.from_nnx(v),
    "to_nnx": lambda v: jaxbn.convert.to_nnx(nnx.BatchNorm(3, rngs=rngs()), v, v),
    "from_haiku": lambda v: jaxbn.convert.from_haiku(v, v, "bn"),
    "to_haiku": lambda v: jaxbn.convert.to_haiku(v, v, "bn", ndim=2, decay_rate=0.9),
    "from_equinox": lambda v: jaxbn.convert.from_equinox(v, v),
    "to_equinox": lambda v: jaxbn.convert.to_equinox(v, v, *jaxbn.bn_init(3)),
    "from_torch_network": lambda v: jaxbn.convert.from_torch_network({}, v, {}),
    "from_keras_network": lambda v: jaxbn.convert.from_keras_network({}, v, {}),
    "names": lambda v: jaxbn.convert.from_torch_network({}, {}, v),
    "linen.recalibrate": lambda v: jaxbn.linen.recalibrate(lambda v, x: None, v, [X]),
    "linen.health": lambda v: jaxbn.linen.health(v),
    "linen.fold": lambda v: jaxbn.linen.fold(lambda v, x: x, v, PAIRS, X),
    "linen.convert": lambda v: jaxbn.linen.convert(v),
    "linen.affine_mask": lambda v: jaxbn.linen.affine_mask(v),
}


@pytest.mark.parametrize("value", [None, 3, np.ones(3), {1: np.ones(3)}, {"a": None}], ids=str)
@pytest.mark.parametrize("name", NOT_A_LAYER)
def test_what_is_no_layer_is_refused_in_words(name, value):
    if name == "names" and isinstance(value, dict) and "a" in value:
        return  # a layer that is to stay as it is
    with pytest.raises((TypeError, ValueError), match=r"must|not|lacks|Take|does not") as error:
        NOT_A_LAYER[name](value)
    assert error.value.__traceback__ is not None
    frame = error.traceback[-1]
    assert "jaxbn" in str(frame.path), error.value


class Tensor:
    """What PyTorch says of tensors on the meta device, sparse and quantized ones."""

    dtype, shape = "torch.float32", (3,)

    def __init__(self, says):
        self.says = says

    def detach(self):
        """As PyTorch."""
        return self

    def cpu(self):
        """As PyTorch."""
        if isinstance(self.says, NotImplementedError):
            raise self.says
        return self

    def __array__(self, *_, **__):
        raise self.says


TENSORS = {
    "meta": NotImplementedError("Cannot copy out of meta tensor; no data!"),
    "sparse": TypeError("can't convert Sparse layout tensor to numpy."),
    "quantized": TypeError("Got unsupported ScalarType QInt8"),
}
SAVED = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32), "num_batches_tracked": 1}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_without_plain_numbers(kind):
    saved: Any = {**SAVED, "running_mean": Tensor(TENSORS[kind])}
    target = {"batch_stats": {"bn": {"mean": np.zeros(3, np.float32), "var": np.zeros(3, np.float32)}}}
    for call in (
        lambda: jaxbn.convert.from_torch(saved),
        lambda: jaxbn.convert.from_torch_network(target, {f"bn.{k}": v for k, v in saved.items()}, {"bn": "bn"}),
    ):
        with pytest.raises(TypeError, match=r"running_mean.*dense"):
            call()


NAN = np.array([1.0, np.nan, 1.0], np.float32)
NEGATIVE = np.array([1.0, -1.0, 1.0], np.float32)


def as_linen(name, value):
    stats = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32), name: value}
    return jaxbn.convert.from_linen({"batch_stats": stats})


def as_torch(name, value):
    return jaxbn.convert.from_torch({**SAVED, f"running_{name}": value})


def as_network(name, value):
    target = {"batch_stats": {"mean": np.zeros(3, np.float32), "var": np.zeros(3, np.float32)}}
    return jaxbn.convert.from_torch_network(target, {**SAVED, f"running_{name}": value}, {"": ""})


def to_torch(name, value):
    params, state = jaxbn.bn_init(3)
    return jaxbn.convert.to_torch(params, state._replace(**{name: jnp.asarray(value)}))


@pytest.mark.parametrize("call", [as_linen, as_torch, as_network, to_torch])
@pytest.mark.parametrize(("name", "value"), [("var", NAN), ("var", NEGATIVE), ("mean", NAN)])
def test_statistics_that_evaluation_cannot_use(call, name, value):
    with pytest.raises(ValueError, match=r"NaN|negative"):
        call(name, value)


def test_folding_where_only_the_statistics_are_shared():
    """Two normalizations with their own scale and bias, one of them right behind a layer."""

    class Shared(nnx.Module):
        def __init__(self):
            self.first, self.second = nnx.Linear(3, 3, rngs=rngs()), nnx.Linear(3, 3, rngs=rngs())
            self.one, self.other = norm(), norm()
            self.other.mean, self.other.var = self.one.mean, self.one.var
            self.other.scale[...] = jnp.full(3, 2.0)

        def __call__(self, x):
            return self.other(jax.nn.relu(self.second(jax.nn.relu(self.one(self.first(x))))))

    model = Shared()
    model(X)
    new = jaxbn.nnx.fold(model, {"first": "one"}, X)
    model.eval()
    np.testing.assert_allclose(new(X), model(X), atol=1e-5)
    assert isinstance(new.other, jaxbn.nnx.BatchNorm)
    found = jaxbn.nnx.health(model, X)
    gaps = [layer.batch.mean for layer in found]
    assert gaps[0] != gaps[1]  # each has its own input
