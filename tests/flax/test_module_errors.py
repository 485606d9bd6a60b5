"""Refuse misuse of the modules in words that help."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError
from flax_layers import KEY, SEQUENCES, STATS, X, norm, rngs, run_nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


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


def test_import_without_flax_names_the_extra():
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
def test_a_wrong_width_advises_the_user_of_a_module(name):
    with pytest.raises(ValueError, match="must") as error:
        WIDTHS[name]()
    assert "_init(" not in str(error.value)
    assert "params." not in str(error.value)


MODULES = {
    "nnx BatchNorm": lambda x, **o: norm(**o)(x),
    "nnx IterNorm": lambda x, **o: jaxbn.nnx.IterNorm(3, **o, rngs=rngs())(x),
    "nnx cell": lambda x, **o: step(jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, **o, rngs=rngs()), x),
    "linen BatchNorm": lambda x, **o: jaxbn.linen.BatchNorm(**o).init(KEY, x),
    "linen IterNorm": lambda x, **o: jaxbn.linen.IterNorm(**o).init(KEY, x),
    "linen cell": lambda x, **o: step(jaxbn.linen.BatchNormLSTMCell(5, 4, **{"use_running_average": False} | o), x),
}


def step(cell, x):
    if isinstance(cell, nnx.Module):
        return cell(cell.initialize_carry(X.shape), x)
    return cell.init(KEY, cell.initialize_carry(KEY, X.shape), x)


@pytest.mark.parametrize("name", ["linen cell", "nnx cell"])
def test_inputs_of_a_cell_have_features(name):
    options = {"use_running_average": False} if name == "nnx cell" else {}
    with pytest.raises(ValueError, match=r"`inputs` must be \[\*batch, "):
        MODULES[name](1.0, **options)


@pytest.mark.parametrize("x", [None, "image", object(), [[1.0], [1.0, 2.0]], np.array(["a"])], ids=type)
@pytest.mark.parametrize("name", MODULES)
def test_inputs_are_arrays(name, x):
    options = {"use_running_average": False} if "cell" not in name else {}
    with pytest.raises(TypeError, match=r"`(x|inputs)` must be a number or an array of numbers; got"):
        MODULES[name](x, **options)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "linen cell"])
def test_a_mode_that_was_never_said_is_refused(name):
    with pytest.raises(ValueError, match="use_running_average"):
        MODULES[name](X, use_running_average=None)


@pytest.mark.parametrize("mode", [64, 0, "False", np.ones((8, 1), bool), jnp.float32(1)], ids=type)
@pytest.mark.parametrize("name", MODULES)
def test_the_mode_is_a_bool(name, mode):
    """The fix is for a number of features, or a mask, in its place."""
    with pytest.raises(TypeError, match=r"`use_running_average` must be True, .*; got .*`mask=`; .* features from `x`"):
        MODULES[name](X, use_running_average=mode)


@pytest.mark.parametrize("name", ["nnx BatchNorm", "linen BatchNorm"])
def test_frozen_is_known_when_compiled(name):
    def call(frozen):
        return MODULES[name](X, use_running_average=True, frozen=frozen)

    call(np.True_)
    for frozen in ("no", 1, None, jnp.array(True)):
        with pytest.raises(TypeError, match=r"`frozen` must be True or False; got"):
            call(frozen)
    with pytest.raises(TypeError, match=r"`frozen` must be True or False; got"):
        jax.jit(call)(True)


@pytest.mark.parametrize("option", [{"dtype": "bf16"}, {"dtype": jnp.int32}, {"param_dtype": int}], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_dtypes_are_floating_point(name, option):
    mode = {} if "cell" in name else {"use_running_average": False}
    with pytest.raises(TypeError, match=f"`{next(iter(option))}` must be a floating point dtype, such as .*; got"):
        MODULES[name](X, **mode, **option)


@pytest.mark.parametrize("axis", [(), (0, 1)])
@pytest.mark.parametrize("name", ["nnx IterNorm", "linen IterNorm"])
def test_whitening_has_one_feature_axis(name, axis):
    with pytest.raises(ValueError, match=r"`axis` must be one axis.*; got \("):
        MODULES[name](X, use_running_average=False, axis=axis)


@pytest.mark.parametrize("name", ["BatchNorm", "IterNorm"])
def test_float8_is_refused_in_words(name):
    """Unless the layer has a `dtype` to compute in."""
    x = X.astype(jnp.float8_e4m3fn)
    for call in (
        lambda **o: getattr(jaxbn.nnx, name)(3, **o, rngs=rngs())(x),
        lambda **o: getattr(jaxbn.linen, name)(use_running_average=True, **o).init_with_output(KEY, x)[0],
    ):
        with pytest.raises(TypeError, match=r"astype"):
            call()
        assert call(dtype=jnp.float32).dtype == jnp.float32


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


def test_linen_does_without_nnx():
    """Importing one Flax API imports no other."""
    program = "import sys, jaxbn.linen; assert 'flax.nnx' not in sys.modules and 'jaxbn.nnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
