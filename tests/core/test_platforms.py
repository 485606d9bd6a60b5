"""One program for any process that traces it: the platform is chosen at lowering, unused devices change nothing."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

PLATFORMS = ("cpu", "cuda", "tpu")
PARAMS, STATE = jaxbn.bn_init(4)
X = np.random.default_rng(0).normal(3, 2, (8, 16, 16, 4)).astype(np.float32)


def training_step(params, state, x):
    def loss(params, x):
        y, new = jaxbn.bn_apply(params, state, x, True, activation=jax.nn.relu)
        return jnp.sum(y * y), (y, new)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def lowered(platform):
    return jax.jit(training_step).trace(PARAMS, STATE, X).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.compiler
def test_each_platform_gets_its_own_program():
    """Barriers on a CPU alone; no loop, and one sum of pairs backward, on a GPU alone."""
    text = {platform: lowered(platform) for platform in PLATFORMS}
    barriers = {platform: t.count("stablehlo.optimization_barrier") for platform, t in text.items()}
    assert barriers["cpu"] > 0
    assert barriers["cuda"] == barriers["tpu"] == 0
    loops = {platform: t.count("stablehlo.while") for platform, t in text.items()}
    assert loops == {"cpu": 1, "cuda": 0, "tpu": 1}
    pairs = {platform: len(re.findall(r"stablehlo.reduce.*tensor<8x16x16x4x2xf32>", t)) for platform, t in text.items()}
    assert pairs == {"cpu": 0, "cuda": 1, "tpu": 0}


@pytest.mark.compiler
def test_an_export_for_several_platforms_has_all_of_them():
    exported = jax.export.export(jax.jit(training_step), platforms=PLATFORMS)(PARAMS, STATE, X)
    text = exported.mlir_module()
    assert "stablehlo.optimization_barrier" in text
    assert "tensor<8x16x16x4x2xf32>" in text
    again = jax.export.deserialize(exported.serialize())
    for got, wanted in zip(
        jax.tree.leaves(again.call(PARAMS, STATE, X)),
        jax.tree.leaves(jax.jit(training_step)(PARAMS, STATE, X)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "made",
    [
        *jaxbn.bn_init(2),
        jaxbn.moments(np.ones((3, 2), np.float32)),
        jaxbn.whitening.whiten_init(2)[1],
        *jaxbn.lstm.lstm_init(jax.random.key(0), 2, 3, 2),
        jaxbn.lstm.lstm_carry(jaxbn.lstm.lstm_init(jax.random.key(0), 2, 3, 2)[0], 1),
    ],
    ids=lambda made: type(made).__name__,
)
def test_named_tuples_are_exported(made):
    exported = jax.export.export(jax.jit(lambda v: v))(made)
    again = jax.export.deserialize(exported.serialize()).call(made)
    assert type(again) is type(made)


PROGRAM = """
import hashlib, sys, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_platforms", "cpu")
sys.path[:0] = sys.argv[2:]
from test_platforms import digest
print(digest())
"""


def digest() -> str:
    """Return the program of one device, and the bits that it computes, as a number."""
    step = jax.jit(training_step)
    text = step.lower(PARAMS, STATE, X).compile().as_text()
    bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(step(PARAMS, STATE, X)))
    return hashlib.sha256(re.sub(r"metadata=\{[^}]*\}", "", text).encode() + bits).hexdigest()


@pytest.mark.compiler
def test_devices_that_are_not_used_change_nothing():
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(devices), str(Path(__file__).parent), str(Path(__file__).parents[1])],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for devices in (1, 8)
    }
    assert len(found) == 1


def test_nothing_reads_the_machine():
    package = Path(jaxbn.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for guess in ("default_backend", "device_count", "jax.devices", "local_devices"):
            assert guess not in text, f"{path.name} asks for {guess}"


@pytest.mark.compiler
@pytest.mark.parametrize("mask", [False, True])
def test_evaluation_is_plain(mask):
    """A subtraction, a multiplication, an addition; nothing that breaks exporters, and derivatives of every kind."""

    def evaluate(x):
        given = np.ones((8, 1, 1, 1), bool) if mask else None
        return jaxbn.bn_apply(PARAMS, STATE, x, False, mask=given)[0]

    names = {eqn.primitive.name for eqn in jax.make_jaxpr(evaluate)(X).jaxpr.eqns}
    allowed = {"broadcast_in_dim", "add", "sub", "mul", "rsqrt", "convert_element_type"}
    masking = {"abs", "is_finite", "lt", "gt", "or", "and", "jit", "stop_gradient", "select_n", "reshape"}
    assert names <= (allowed | masking if mask else allowed)


def test_taylor_series_of_evaluation():
    """`jax.experimental.jet`, which knows neither names nor custom rules."""
    from jax.experimental import jet

    def evaluate(x):
        return jaxbn.bn_apply(PARAMS, STATE, x, False, activation=jnp.tanh)[0]

    y, (first, second) = jet.jet(evaluate, (X,), ((jnp.ones_like(X), jnp.zeros_like(X)),))
    _, wanted = jax.jvp(evaluate, (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(y, evaluate(X), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(first, wanted, rtol=1e-5, atol=2e-6)
    _, wanted = jax.jvp(lambda x: jax.jvp(evaluate, (x,), (jnp.ones_like(x),))[1], (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(second, wanted, rtol=1e-4, atol=5e-6)
