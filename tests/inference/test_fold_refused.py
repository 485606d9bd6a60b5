"""Find the pairs to fold, and refuse wrong ones by name."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(3, 6, 5, 2)), np.float32)
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


class Wrong(nn.Module):
    """Pairs that cannot be folded, beside one that can."""

    @nn.compact
    def __call__(self, x, train=False, early=False):
        """Return a number."""
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=not train)
        x = norm(name="right_norm")(nn.Dense(2, name="right")(x))
        x = norm(name="after_relu")(nn.relu(nn.Dense(2, name="relu")(x)))
        shared = nn.Dense(2, name="shared")
        x = norm(name="second")(shared(norm(name="first")(shared(x))))
        x = norm(name="rows", axis=1)(nn.Dense(5, name="square")(x))
        x = norm(name="wide")(nn.Dense(7, name="narrow")(x)[..., :5])
        return x if early else norm(name="late_norm")(nn.LayerNorm(name="plain")(nn.Dense(5, name="late")(x)))


RIGHT = {"right": "right_norm"}
BAD = {
    "not directly after": ({**RIGHT, "relu": "after_relu"}, {}, ["'relu' -> 'after_relu'", "activation"]),
    "a shared layer": ({**RIGHT, "shared": "second"}, {}, ["'shared' -> 'second'"]),
    "statistics of rows": ({**RIGHT, "square": "rows"}, {}, ["'square' -> 'rows'"]),
    "feature counts": ({"narrow": "wide"}, {}, ["'wide'", "'narrow'", "(5,)", "(7,)"]),
    "misspelt layer": ({"rihgt": "right_norm"}, {}, ["'rihgt'", "Did you mean 'right'"]),
    "misspelt normalization": ({"right": "right_norn"}, {}, ["'right_norn'", "Did you mean 'right_norm'"]),
    "no normalization": ({"late": "plain"}, {}, ["'plain'", "mean and var"]),
    "one normalization twice": ({**RIGHT, "relu": "right_norm"}, {}, ["'right_norm'", "twice", "once"]),
    "training": (RIGHT, {"train": True}, ["`apply`", "evaluation", "'right_norm'", "train=False"]),
    "not called": ({"late": "late_norm"}, {"early": True}, ["'late'", "not call", "plain function"]),
}


@pytest.mark.parametrize("name", BAD)
def test_linen_refuses(name):
    """It refuses at initialization too, where all biases and means are 0 and a ReLU and a normalization commute."""
    pairs, options, words = BAD[name]
    model, x = Wrong(), X[:, :5, :, :]
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        jaxbn.linen.fold(partial(model.apply, **options), variables, x, pairs=pairs)
    assert all(word in str(error.value) for word in words), error.value
    assert "'right' ->" not in str(error.value)


def test_statistics_of_something_else():
    """A module of the user's own that keeps mean and var may do anything with them."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, var = (self.variable("batch_stats", name, lambda: jnp.ones(3)) for name in ("mean", "var"))
            return (x - mean.value) * var.value

    model = nn.Sequential([nn.Dense(3), Own()])
    with pytest.raises(ValueError, match="'layers_1' is a Own"):
        jaxbn.linen.fold(model.apply, model.init(KEY, X), X, pairs={"layers_0": "layers_1"})


@pytest.mark.parametrize("pairs", [{}, 3, ["Dense_0"]])
def test_pairs_must_be_pairs(pairs):
    model = Wrong()
    with pytest.raises(TypeError, match="`pairs` must map"):
        jaxbn.linen.fold(model.apply, model.init(KEY, X[:, :5]), X[:, :5], pairs=pairs)


@pytest.mark.parametrize("options", [{"num_domains": 2}, {"example_weight": 0.5}])
def test_layers_of_several_affine_maps_are_refused(options):
    words = "'norm' into 'dense'.*" + "=".join(map(str, *options.items()))
    call = {"domain": 1} if "num_domains" in options else {}

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jaxbn.linen.BatchNorm(use_running_average=True, name="norm", **options)
            return norm(nn.Dense(2, name="dense")(x), **call)

    stateful = nnx.Dict(
        dense=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), norm=jaxbn.nnx.BatchNorm(2, **options, rngs=nnx.Rngs(0))
    )
    model, x = Own(), X[:, 0, 0]
    with pytest.raises(ValueError, match=words):
        jaxbn.linen.fold(model.apply, model.init(KEY, x), x, pairs={"dense": "norm"})
    with pytest.raises(ValueError, match=words):
        jaxbn.nnx.fold(stateful, x, lambda m, x: m["norm"](m["dense"](x), **call), pairs={"dense": "norm"})


def test_pairs_are_found():
    """The one that can be folded is, as if it were named; a warning says of each of the others why not."""
    model, x = Wrong(), X[:, :5, :, :]
    variables = model.init(KEY, x)
    with pytest.warns(UserWarning, match="leaves 6 of 7") as caught:
        new = jaxbn.linen.fold(model.apply, variables, x)
    jax.tree.map(np.testing.assert_array_equal, new, jaxbn.linen.fold(model.apply, variables, x, pairs=RIGHT))
    (warning,) = caught
    for words in (
        "'after_relu': not directly after",
        "'first': 'shared' feeds several",
        "'rows': folding it changes the outputs",
        "'late_norm': not directly",
    ):
        assert words in str(warning.message)


def test_a_layer_that_is_used_elsewhere_too_stays():
    """Its output goes into the normalization and past it, which only the outputs show."""

    class Past(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            y = jaxbn.linen.BatchNorm(use_running_average=True)(x)
            return jaxbn.linen.BatchNorm(use_running_average=True)(nn.Dense(3)(x + y))

    model, x = Past(), X[:, 0, 0]
    variables = model.init(KEY, x)
    with pytest.warns(UserWarning, match="1 of 2.*'BatchNorm_0': folding it changes"):
        new = jaxbn.linen.fold(model.apply, variables, x)
    jax.tree.map(np.testing.assert_array_equal, new["params"]["Dense_0"], variables["params"]["Dense_0"])
    np.testing.assert_allclose(model.apply(new, x), model.apply(variables, x), atol=1e-5)
    # With `drop`, the one that stays keeps its variables.
    with pytest.warns(UserWarning, match="1 of 2"):
        dropped = jaxbn.linen.fold(model.apply, variables, x, drop=True)
    assert set(dropped["batch_stats"]) == {"BatchNorm_0"}


def test_a_model_without_a_pair_is_refused():
    model = nn.Sequential([jaxbn.linen.BatchNorm(use_running_average=True), nn.Dense(3)])
    x = X[:, 0, 0]
    with pytest.raises(ValueError, match=r"'layers_0': not directly after one layer.*fold_into_next") as error:
        jaxbn.linen.fold(model.apply, model.init(KEY, x), x)
    assert "tolerance" not in str(error.value)  # which is for outputs that differ
    plain = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no batch normalization"):
        jaxbn.nnx.fold(plain, x)


class After(nn.Module):
    """A normalization after an activation, which must not be folded away."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        return jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(nn.relu(nn.Dense(3, name="dense")(x)))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (lambda y, x: y.argmax(-1), r"return logits, not classes; got int32\[3, 6, 5\]"),
        (lambda y, x: ["cat", object()], "return logits, not classes; got str, object"),
        (lambda y, x: {"labels": y.argmax(-1), "inputs": x, "name": "cat"}, r"'dense' -> 'norm' \(inf\)"),
        (lambda y, x: {"logits": y, "name": "cat", "own": object()}, r"'dense' -> 'norm' \(\d"),
    ],
    ids=["classes", "no arrays", "classes and inputs", "logits and no arrays"],
)
def test_a_wrong_fold_shows_in_any_outputs_or_they_are_refused(outputs, words):
    model, x = After(), X
    variables, pairs = model.init(KEY, x), {"dense": "norm"}
    with pytest.raises(ValueError, match=words):
        jaxbn.linen.fold(lambda v, x: outputs(model.apply(v, x), x), variables, x, pairs=pairs)


def test_outputs_beside_the_logits_may_be_anything():
    """A label, a name and an object: the right fold is accepted."""
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    new = jaxbn.nnx.fold(model, X[:, 0, 0], lambda m, x: [m(x), m(x).argmax(-1), "cat", object(), 3, np.array("a")])
    assert "Folded" in str(type(new.layers[1]))
