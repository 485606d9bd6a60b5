"""Refuse arguments of `convert`, `recalibrate`, `fold` and `health` that cannot be right, in words that help."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = np.asarray(np.random.default_rng(0).normal(2, 3, (8, 4)), np.float32)
MODEL = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
VARIABLES: Any = jax.jit(MODEL.init)(jax.random.key(0), X)
ABSTRACT = jax.eval_shape(lambda: VARIABLES)
UPDATING = partial(MODEL.apply, mutable=["batch_stats"])
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def stateful():
    norm = jaxbn.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    return nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), norm)


def abstract():
    return nnx.eval_shape(stateful)


LINEN: dict[str, Any] = {
    "recalibrate": lambda apply, variables, x: jaxbn.linen.recalibrate(apply, variables, [x]),
    "fold": jaxbn.linen.fold,
    "health": lambda apply, variables, x: jaxbn.linen.health(variables, apply, x),
}
NNX: dict[str, Any] = {
    "recalibrate": lambda model, x, *call: jaxbn.nnx.recalibrate(model, [x], *call),
    "fold": jaxbn.nnx.fold,
    "health": jaxbn.nnx.health,
}


@pytest.mark.parametrize("tool", LINEN)
def test_the_model_itself_is_no_function(tool):
    with pytest.raises(TypeError, match=r"`apply` must be a function .*model.apply.*; got a Sequential"):
        LINEN[tool](MODEL, VARIABLES, X)
    with pytest.raises(TypeError, match=r"`call` must be a function .*; got a Sequential"):
        NNX[tool](stateful(), X, stateful())


@pytest.mark.parametrize("tool", LINEN)
def test_models_without_numbers_are_refused(tool):
    """Shapes alone, as `jax.eval_shape` gives, and lists, as JSON."""
    lists = jax.tree.map(lambda v: v.tolist(), VARIABLES)
    for variables, kind in ((ABSTRACT, "ShapeDtypeStruct"), (lists, "list")):
        with pytest.raises(TypeError, match=f"must hold arrays; 'mean' of 'layers_1' is a {kind}"):
            LINEN[tool](UPDATING, variables, X)
    with pytest.raises(TypeError, match="must hold arrays; 'mean' of 'layers/1' is a ShapeDtypeStruct"):
        NNX[tool](abstract(), X)


def test_models_without_numbers_are_converted():
    """A checkpoint is restored into them."""
    assert jaxbn.linen.convert(ABSTRACT)["batch_stats"]["layers_1"]["mean"].shape == (3,)
    model = jaxbn.nnx.convert(abstract(), momentum=0.5)
    assert isinstance(model.layers[1].mean.get_value(), jax.ShapeDtypeStruct)
    assert model.layers[1].momentum == 0.5


@pytest.mark.parametrize("tool", ["recalibrate", "fold", "health"])
def test_tools_run_outside_of_compiled_functions(tool):
    with pytest.raises(TypeError, match=r"numbers.*outside"):
        nnx.jit(lambda model, x: NNX[tool](model, x) and None)(stateful(), X)
    with pytest.raises(TypeError, match=r"numbers.*outside"):
        jax.jit(lambda variables, x: LINEN[tool](UPDATING, variables, x) and None)(VARIABLES, X)


@pytest.mark.parametrize("batches", [{"image": X}, ["a"], [object()], [np.array(["a"])], [{"x": X, "label": "cat"}]])
def test_batches_hold_arrays(batches):
    with pytest.raises(TypeError, match=r"`batches` must hold trees of arrays; got .*`\[batch\]`"):
        jaxbn.linen.recalibrate(UPDATING, VARIABLES, batches)
    with pytest.raises(TypeError, match=r"`batches` must hold trees of arrays; got .*`\[batch\]`"):
        jaxbn.nnx.recalibrate(stateful(), batches)


def test_pairs_of_inputs_and_labels_are_named():
    """A loader gives them, and the model fails in words of its own."""
    pairs = [(X, np.zeros(8, np.int32))]
    for recalibrate in (
        partial(jaxbn.linen.recalibrate, UPDATING, VARIABLES),
        partial(jaxbn.nnx.recalibrate, stateful()),
    ):
        with pytest.raises((TypeError, DeprecationWarning)) as error:
            recalibrate(pairs)
        assert any("`model(batch[0])`" in note for note in error.value.__notes__)


def test_a_batch_without_examples_proves_nothing():
    """No fold is compared on it, and no layer found healthy."""
    none = X[:0]
    for fold in (partial(jaxbn.linen.fold, MODEL.apply, VARIABLES), partial(jaxbn.nnx.fold, stateful())):
        with pytest.raises(ValueError, match="`x` must hold an example"):
            fold(none)
    masked = jaxbn.diagnostics.health(*jaxbn.bn_init(4), X, mask=np.zeros((8, 1), bool))
    for found in (jaxbn.linen.health(VARIABLES, MODEL.apply, none), jaxbn.nnx.health(stateful(), none), masked):
        assert found[0].batch is None
        assert "No batch was compared: none with examples was given, or the layers ran in compiled code." in str(found)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "0", None])
def test_a_tolerance_is_a_number(tolerance):
    for fold in (partial(jaxbn.linen.fold, MODEL.apply, VARIABLES), partial(jaxbn.nnx.fold, stateful())):
        with pytest.raises((TypeError, ValueError), match="`tolerance` must be"):
            fold(X, tolerance=tolerance)


@pytest.mark.parametrize("epsilon", ["a", -1.0, None])
def test_an_epsilon_is_a_number(epsilon):
    with pytest.raises((TypeError, ValueError), match="`epsilon` must be"):
        jaxbn.linen.health(VARIABLES, epsilon=epsilon)
    with pytest.raises((TypeError, ValueError), match="`epsilon` must be"):
        jaxbn.diagnostics.health(*jaxbn.bn_init(3), epsilon=epsilon)


@pytest.mark.parametrize("count", ["a", -1, 2**31, 2.5, [3, -1], True])
def test_a_count_is_a_number_of_updates(count):
    with pytest.raises((TypeError, ValueError), match="`count` must be"):
        jaxbn.linen.convert(VARIABLES, count=count)


@pytest.mark.parametrize("to", [nnx.Linear, nnx.LayerNorm, "BatchNorm", None])
def test_only_batch_normalizations_are_converted_to(to):
    with pytest.raises(TypeError, match=r"`to` must be `jaxbn.nnx.BatchNorm` or `flax.nnx.BatchNorm`; got"):
        jaxbn.nnx.convert(stateful(), to)


@pytest.mark.parametrize(
    "model",
    [None, nnx.BatchNorm, nnx.state(stateful()), nnx.graphdef(stateful()), MODEL, VARIABLES, X, 3, []],
    ids=type,
)
@pytest.mark.parametrize("tool", [jaxbn.nnx.convert, jaxbn.nnx.affine_mask])
def test_what_is_no_model_is_not_converted(tool, model):
    """It would come back unchanged, without a word."""
    with pytest.raises(TypeError, match=r"`model` must be an nnx module .*; got"):
        tool(model)


def test_one_part_of_a_batch_is_none_for_any_integer():
    layer = jaxbn.nnx.BatchNorm(3, ghost_batches=np.int64(1), rngs=nnx.Rngs(0))
    assert type(jaxbn.nnx.convert(layer, nnx.BatchNorm)) is nnx.BatchNorm
    with pytest.raises(ValueError, match="has no ghost_batches"):
        jaxbn.nnx.convert(jaxbn.nnx.BatchNorm(3, ghost_batches=np.int64(2), rngs=nnx.Rngs(0)), nnx.BatchNorm)


def test_collections_of_other_names_are_not_found():
    other = {"params": VARIABLES["params"], "statistics": VARIABLES["batch_stats"]}
    with pytest.raises(ValueError, match="must hold `batch_stats`"):
        jaxbn.linen.recalibrate(UPDATING, other, [X])
