"""The rematerialization policy: what is kept, what is computed twice, and that the numbers stay the same."""

from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from ways import AXIS, assert_close, mesh_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx

LAYERS, ROWS, FEATURES = 3, 512, 4
PARAMS, STATE = jaxbn.bn_init(FEATURES)
rng = np.random.default_rng(0)
X = rng.standard_normal((ROWS, FEATURES)).astype(np.float32)
KERNELS = rng.standard_normal((LAYERS, FEATURES, FEATURES)).astype(np.float32)


def loss(params, kernels, x, axis_name=None, train=True):
    """Apply normalization, activation and product, three times."""
    for kernel in kernels:
        y, _ = jaxbn.bn_apply(params, STATE, x, train, activation=jnp.tanh, axis_name=axis_name)
        x = lax.dot(y, kernel)
    return jnp.sum(jnp.sin(x))


def lean(params, kernels, x, axis_name=None, train=True):
    """Apply the same under the policy."""
    rematerialized = jax.checkpoint(partial(loss, axis_name=axis_name, train=train), policy=jaxbn.save_inputs)
    return rematerialized(params, kernels, x)


def stored(f, *args) -> float:
    """Arrays of x's size that the backward pass of `f` holds."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(f, *args)[1])) / X.nbytes


def counted(f, *args) -> Counter[str]:
    """Return the primitives of the gradient of `f`, nested ones too, before any compiler removes duplicates."""
    found: Counter[str] = Counter()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] += 1
            for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(*args).jaxpr)
    return found


def test_the_gradient_stays_the_same():
    for train in (True, False):
        plain, again = (jax.jit(jax.grad(f, argnums=(0, 1, 2)), static_argnums=(3, 4)) for f in (loss, lean))
        assert_close(
            again(PARAMS, KERNELS, X, None, train), plain(PARAMS, KERNELS, X, None, train), atol=1e-4, rtol=1e-5
        )


def test_one_array_a_layer_is_kept():
    """The input of each normalization; without the policy also the output of each, and the last product."""
    assert LAYERS <= stored(partial(lean, x=X), PARAMS, KERNELS) <= 1.1 * LAYERS
    assert stored(partial(loss, x=X), PARAMS, KERNELS) >= 2 * LAYERS


@pytest.mark.compiler
def test_neither_products_nor_statistics_are_computed_twice():
    """Only the last product is, which reaches no normalization; with no policy all of them are."""
    plain = counted(lambda p, k: loss(p, k, X), PARAMS, KERNELS)
    kept = counted(lambda p, k: lean(p, k, X), PARAMS, KERNELS)
    nothing = counted(lambda p, k: jax.checkpoint(loss)(p, k, X), PARAMS, KERNELS)
    assert kept["reduce_sum"] == plain["reduce_sum"] < nothing["reduce_sum"]
    assert kept["dot_general"] == plain["dot_general"] + 1 < nothing["dot_general"]


@pytest.mark.compiler
def test_no_collective_is_repeated():
    mesh = mesh_of(jax.sharding.AxisType.Auto)

    def sums(f):
        mapped = jax.shard_map(
            lambda p, k, x: jax.grad(f, argnums=(0, 1))(p, k, x, AXIS),
            mesh=mesh,
            in_specs=(P(), P(), P(AXIS)),
            out_specs=P(),
        )
        text = str(jax.make_jaxpr(mapped)(PARAMS, KERNELS, X))
        return text.count("psum_invariant") + text.count("psum[")

    assert sums(lean) == sums(loss) > 0


def test_a_loop_that_carries_inputs_keeps_one_array_a_layer():
    def step(x, kernel):
        y, _ = jaxbn.bn_apply(PARAMS, STATE, x, True, activation=jax.nn.relu)
        return lax.dot(y, kernel), None

    def network(body):
        return lambda kernels: lax.scan(body, X, kernels)[0]

    assert stored(network(jax.checkpoint(step, policy=jaxbn.save_inputs)), KERNELS) <= 1.1 * LAYERS
    assert stored(network(step), KERNELS) >= 2 * LAYERS


def test_flax_modules_take_it():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxbn.linen.BatchNorm(use_running_average=False, activation=nn.relu)(x)
            return nn.Dense(FEATURES)(x)

    def pulled(block):
        variables = block().init(jax.random.key(0), X)
        rest = {k: v for k, v in variables.items() if k != "params"}

        def f(params, x):
            return block().apply({"params": params, **rest}, x, mutable=["batch_stats"])[0]

        return stored(f, variables["params"], X), jax.grad(lambda p: jnp.sum(f(p, X)))(variables["params"])

    kept, gradients = pulled(nn.remat(Block, policy=jaxbn.save_inputs))
    plain, wanted = pulled(Block)
    assert kept <= 1.2 < 2 <= plain
    assert_close(jax.tree.leaves(gradients), jax.tree.leaves(wanted), atol=1e-4)

    class Stateful(nnx.Module):
        def __init__(self):
            self.norm = jaxbn.nnx.BatchNorm(FEATURES, activation=nnx.relu, rngs=nnx.Rngs(0))
            self.dense = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(self.norm(x))

    lean_call = nnx.remat(Stateful.__call__, policy=jaxbn.save_inputs)
    found = []
    for call in (lean_call, Stateful.__call__):
        model = Stateful()
        found.append(nnx.grad(lambda m, call=call: jnp.sum(call(m, X)))(model))
        assert float(jnp.max(jnp.abs(model.norm.mean[...]))) > 0  # updated once, through rematerialization
    assert_close(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), atol=1e-4)
