"""Parameters and statistics of several domains, each a layer of its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ways import assert_close, each_way

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROWS, PLACES, FEATURES = 16, 2, 3
rng = np.random.default_rng(0)
X = (rng.standard_normal((ROWS, PLACES, FEATURES)) * 2 + 5).astype(np.float32)
G = rng.standard_normal(X.shape).astype(np.float32)
DOMAINS = 3


def domains():
    params, state = jaxbn.domains.domain_init(DOMAINS, FEATURES)
    scale = jnp.arange(1.0, 1 + DOMAINS)[:, None] * jnp.ones((1, FEATURES))
    return params._replace(scale=scale), state


def test_each_domain_is_a_layer_of_its_own():
    """One compiled program for all; outputs, states and gradients are those of three layers; the others stay."""
    params, state = domains()
    own = [jax.tree.map(lambda v, d=d: v[d], (params, state)) for d in range(DOMAINS)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x, domain):
        def loss(params, x):
            y, new = jaxbn.domains.domain_apply(params, state, x, True, domain, momentum=0.9)
            return jnp.sum(y * G), new

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    def alone(params, state, x):
        y, new = jaxbn.bn_apply(params, state, x, True, momentum=0.9)
        return jnp.sum(y * G), new

    for i, domain in enumerate((2, 0, 2, 1)):
        x = X + np.float32(i)
        (d_params, dx), state = step(params, state, x, domain)
        (own_params, own_dx), new = jax.jit(jax.grad(alone, argnums=(0, 2), has_aux=True))(*own[domain], x)
        own[domain] = (own[domain][0], new)
        assert_close(dx, own_dx, atol=1e-5)
        for d in range(DOMAINS):
            picked = jax.tree.map(lambda v, d=d: v[d], (d_params, state))
            assert_close(picked[1], own[d][1], atol=1e-6)
            assert_close(picked[0], own_params if d == domain else jax.tree.map(jnp.zeros_like, own_params), atol=1e-5)
    assert state.count.tolist() == [1, 1, 2]


@pytest.mark.parametrize("train", [False, True])
def test_domains_under_vmap(train):
    """A batch and a domain for each: its output, and that domain's state alone is another, if it is training."""
    params, state = domains()
    xs = np.stack([X, X + 1, X - 2, X])
    at = np.array([0, 2, 1, 2])
    y, new = jax.vmap(lambda x, d: jaxbn.domains.domain_apply(params, state, x, train, d, momentum=0.9))(xs, at)
    for i, d in enumerate(at):
        own = jax.tree.map(lambda v, d=d: v[d], (params, state))
        wanted, after = jaxbn.bn_apply(*own, xs[i], train, momentum=0.9)
        assert_close(y[i], wanted, atol=2e-6)
        whole = jax.tree.map(lambda v, n, d=d: v.at[d].set(n), state, after)
        assert_close(jax.tree.map(lambda v, i=i: v[i], new), whole, atol=1e-6 if train else 0.0)


@each_way
def test_domains_on_many_devices(way):
    """Outputs, states and gradients are those of one device, with unequal masks over NaN."""
    params, state = domains()
    mask = np.ones((32, 1), bool)
    mask[4:6], mask[31] = False, False
    x = np.where(mask, rng.standard_normal((32, FEATURES)), np.nan).astype(np.float32)

    def member(whole, pieces, name=way.axis_name):
        def value(params, x):
            options = {"mask": pieces["mask"], "axis_name": name}
            y, new = jaxbn.domains.domain_apply(params, whole["state"], x, True, whole["domain"], **options)
            return jnp.sum(jnp.where(pieces["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(value, argnums=(0, 1), has_aux=True)
        (d_params, dx), (y, new) = gradient(whole["params"], pieces["x"])
        return {"y": y, "dx": dx}, (new, way.total(d_params) if name else d_params)

    whole, parts = {"params": params, "state": state, "domain": jnp.array(1, jnp.int32)}, {"x": x, "mask": mask}
    got = way.run(member, whole, parts)
    assert_close(got, jax.jit(lambda w, p: member(w, p, None))(whole, parts))
    chex.assert_tree_all_finite(got)


def test_both_modules_hold_domains():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, num_domains=2, momentum=jaxbn.zero_debiased(0.9))
    variables = layer.init(jax.random.key(0), X, domain=0)
    y, new = layer.apply(variables, X, domain=1, mutable=["batch_stats"])
    stateful = jaxbn.nnx.BatchNorm(FEATURES, num_domains=2, momentum=jaxbn.zero_debiased(0.9), rngs=nnx.Rngs(0))
    assert_close(stateful(X, domain=1), y, atol=1e-6)
    for mean, count in (
        (new["batch_stats"]["mean"], new["batch_stats"]["count"]),
        (stateful.mean[...], stateful.count[...]),
    ):
        np.testing.assert_allclose(mean, np.stack([np.zeros(FEATURES), X.mean((0, 1))]), rtol=1e-6)
        assert count.tolist() == [0, 1]
    for call in (lambda: layer.init(jax.random.key(0), X), lambda: stateful(X)):
        with pytest.raises(ValueError, match="domain"):
            call()
    with pytest.raises(ValueError, match="domain"):
        jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))(X, domain=0)


@pytest.mark.parametrize(
    ("domain", "kind"),
    [(3, ValueError), (-1, ValueError), (0.5, TypeError), (np.array([0]), TypeError), ("a", TypeError)],
)
def test_a_domain_must_be_one_of_them(domain, kind):
    with pytest.raises(kind, match="domain"):
        jaxbn.domains.domain_apply(*domains(), X, True, domain)


def test_domains_refuse_params_and_state_of_one_layer():
    params, state = jaxbn.bn_init(FEATURES)
    with pytest.raises(ValueError, match="leading axis of domains"):
        jaxbn.domains.domain_apply(params, state, X, True, 0)
    for number in (0, -1, (2,), "2"):
        with pytest.raises((TypeError, ValueError)):
            jaxbn.domains.domain_init(number, FEATURES)


def test_a_state_that_was_made_before_the_mesh():
    """On an Explicit mesh it is replicated, as in `bn_apply`."""
    params, state = domains()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = rng.standard_normal((8, FEATURES)).astype(np.float32)
    with jax.set_mesh(mesh):
        got = jaxbn.domains.domain_apply(params, state, jax.device_put(x, P("data")), True, 1)
    assert_close(got, jaxbn.domains.domain_apply(params, state, x, True, 1))
