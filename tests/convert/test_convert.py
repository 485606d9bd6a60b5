"""Checkpoints of single layers against the packages themselves: one contract, a table of layers that must fulfil it."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from flax import nnx
from neighbours import BATCHES, KEEP, Equinox, Haiku, Keras, Linen, Nnx, Torch, assert_same, flat, moved

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState


class Case(NamedTuple):
    """A layer, and the arguments with which the running state of `bn_apply` goes on as its would."""

    make: Callable[[], Any]
    settings: Mapping[str, Any]
    epsilon: float = 1e-5


TORCH = {"momentum": KEEP, "unbiased_running_var": True}
PLAIN = {"momentum": KEEP}
DEBIASED: dict[str, Any] = {"momentum": jaxbn.zero_debiased(KEEP)}
SCHEDULE = DEBIASED["momentum"]
CASES = {
    "torch": Case(Torch, TORCH),
    "torch-cumulative-no-affine": Case(
        lambda: Torch(momentum=None, affine=False), TORCH | {"momentum": jaxbn.cumulative_average}
    ),
    "torch-no-bias": Case(lambda: Torch(bias=False), TORCH),
    "keras": Case(Keras, PLAIN, 1e-3),
    "keras-no-scale": Case(lambda: Keras(scale=False, epsilon=1e-5), PLAIN),
    "keras-no-affine": Case(lambda: Keras(scale=False, center=False), PLAIN, 1e-3),
    "haiku": Case(Haiku, DEBIASED),
    "haiku-no-affine": Case(lambda: Haiku(False, False), DEBIASED),
    "haiku-no-offset": Case(lambda: Haiku(offset=False), DEBIASED),
    "equinox-batch": Case(lambda: Equinox("batch"), DEBIASED),
    "equinox-batch-no-affine": Case(lambda: Equinox("batch", affine=False), DEBIASED),
    "equinox-ema": Case(lambda: Equinox("ema"), PLAIN),
    "equinox-legacy": Case(Equinox, PLAIN),
    "linen": Case(Linen, PLAIN),
    "linen-no-scale": Case(lambda: Linen(use_scale=False), PLAIN),
    "our-linen-schedule": Case(lambda: Linen(jaxbn.linen, SCHEDULE), DEBIASED),
    "nnx": Case(Nnx, PLAIN),
    "nnx-no-bias": Case(lambda: Nnx(use_bias=False), PLAIN),
    "our-nnx-schedule": Case(lambda: Nnx(jaxbn.nnx, SCHEDULE), DEBIASED),
}


class Trained(NamedTuple):
    """A layer after 20 steps there, and what it was then: later tests may train it on."""

    case: Case
    layer: Any
    arrays: dict[str, np.ndarray]
    converted: tuple[BatchNormParams, BatchNormState]
    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module", params=list(CASES))
def trained(request):
    """Every case, trained."""
    case = CASES[request.param]
    layer = case.make()
    for x in BATCHES[:20]:
        layer.train(moved(layer, x))
    x = moved(layer, BATCHES[24])
    return Trained(case, layer, layer.arrays(), layer.converted(), x, np.array(layer.evaluate(x)))


def test_evaluates_as_there_after_20_steps_there(trained):
    case, layer, _, (params, state), x, there = trained
    y, _ = jaxbn.bn_apply(params, state, x, False, axis=layer.axis, epsilon=case.epsilon)
    assert np.std(there) > 0.1
    np.testing.assert_allclose(y, there, rtol=0, atol=1e-5)


def test_evaluates_as_there_before_any_step(trained):
    layer, epsilon = trained.case.make(), trained.case.epsilon
    params, state = layer.converted()
    y, _ = jaxbn.bn_apply(params, state, trained.x, False, axis=layer.axis, epsilon=epsilon)
    # Haiku's and Equinox's first averages are 0: a variance of epsilon, and outputs in the thousands.
    np.testing.assert_allclose(y, np.asarray(layer.evaluate(trained.x)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_goes_on_here_for_5_steps_as_there(trained):
    case, layer, _, (params, before), _, _ = trained
    state = before
    for x in BATCHES[20:]:
        layer.train(moved(layer, x))
        _, state = jaxbn.bn_apply(params, state, moved(layer, x), True, axis=layer.axis, **case.settings)
    _, there = layer.converted()
    # Haiku's variance E[x^2] - E[x]^2 has lost digits where the mean is large.
    np.testing.assert_allclose(state.mean, there.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.var, there.var, rtol=1e-5)
    assert not np.allclose(there.mean, before.mean, rtol=1e-2)
    assert state.count == before.count + 5


def test_there_and_back_is_exact(trained):
    derived = getattr(trained.layer, "derived", ())
    fresh = trained.case.make()
    fresh.load(*trained.converted)
    assert_same(fresh.arrays(), trained.arrays, derived)
    assert_same(flat(fresh.converted()), flat(trained.converted), derived)
    np.testing.assert_allclose(fresh.evaluate(trained.x), trained.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("torch", 1),
        ("keras", 0),
        ("haiku", 1),
        ("equinox-batch", 1),
        ("equinox-ema", 1),
        ("linen", 0),
        ("our-linen-schedule", 1),
        ("nnx", 0),
        ("our-nnx-schedule", 1),
    ],
)
def test_count_is_theirs_or_0(name, count):
    layer = CASES[name].make()
    assert layer.converted()[1].count == 0
    layer.train(moved(layer, BATCHES[0]))
    assert layer.converted()[1].count == count


@pytest.mark.parametrize("momentum", [0.9, SCHEDULE])
def test_an_abstract_nnx_layer_of_several_domains_is_loaded(momentum):
    params, state = jaxbn.domains.domain_init(2, 3, mean=3.0)
    make = partial(jaxbn.nnx.BatchNorm, 3, num_domains=2, momentum=momentum)
    layer: Any = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    jaxbn.convert.to_nnx(layer, params, state)
    assert_same(flat(jaxbn.convert.from_nnx(layer)), flat((params, state)))
    x = BATCHES[0][:2, 0]
    y, _ = jaxbn.domains.domain_apply(*jaxbn.convert.from_nnx(layer), x, False, 1)
    np.testing.assert_allclose(layer(x, True, domain=1), y, rtol=1e-6)


def test_equinox_bias_of_the_first_variance_is_kept():
    layer = Equinox("batch")
    layer.train(moved(layer, BATCHES[0]))
    true = BATCHES[0].var((0, 1))
    np.testing.assert_allclose(layer.converted()[1].var, true + KEEP / (1 - KEEP), rtol=1e-4)


def test_import_needs_none_of_the_packages():
    program = "import sys, jaxbn.convert; print({'torch', 'keras', 'haiku', 'equinox', 'flax'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
