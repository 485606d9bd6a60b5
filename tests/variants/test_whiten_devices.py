"""Whitening on many devices, and on groups of them, against one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from ways import MEMBERS, assert_close, each_way, shard_map_way
from whiten_oracle import PARAMS, ROWS, STATE, X

from jaxbn.whitening import whiten_apply


@each_way
def test_on_many_devices(way):
    """Unequal masks, NaN under them: outputs, state and gradients are those of one device."""
    mask = np.ones((ROWS, 1), bool)
    mask[3:9], mask[63] = False, False
    x = np.where(mask, X, np.nan).astype(np.float32)

    def member(whole, parts, name=way.axis_name):
        def loss(params, x):
            y, new = whiten_apply(params, STATE, x, True, mask=parts["mask"], axis_name=name)
            return jnp.sum(jnp.where(parts["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (d_params, dx), (y, new) = gradient(whole["params"], parts["x"])
        return {"y": y, "dx": dx}, (new, way.total(d_params) if name else d_params)

    got = way.run(member, {"params": PARAMS}, {"x": x, "mask": mask})
    wanted = jax.jit(lambda w, p: member(w, p, None))({"params": PARAMS}, {"x": x, "mask": mask})
    assert_close(got, wanted, atol=2e-3)
    chex.assert_tree_all_finite(got)


def test_groups_of_devices():
    """`axis_index_groups` of unequal sizes, with unequal masks: each group is one device that counts its rows only."""
    groups, way = [[3], [6, 1], [0, 7, 2, 5, 4]], shard_map_way(True)
    mask = np.ones((ROWS, 1), bool)
    mask[3:9], mask[24:26], mask[63] = False, False, False
    x = np.where(mask, X, np.nan).astype(np.float32)

    def member(whole, parts, name=way.axis_name, groups=groups):
        def loss(params, x):
            y, new = whiten_apply(params, STATE, x, True, mask=parts["mask"], axis_name=name, axis_index_groups=groups)
            return jnp.sum(jnp.where(parts["mask"], jnp.sin(y), 0)), (y, new)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (d_params, dx), (y, new) = gradient(whole["params"], parts["x"])
        return {"y": y, "dx": dx, "new": jax.tree.map(lambda v: v[None], new)}, d_params

    got, d_params = way.run(member, {"params": PARAMS}, {"x": x, "mask": mask})
    one, total = jax.jit(lambda w, p: member(w, p, None, None)), jax.tree.map(jnp.zeros_like, PARAMS)
    for group in groups:
        mine = np.isin(np.arange(ROWS) // (ROWS // MEMBERS), group)
        wanted, own = one({"params": PARAMS}, {"x": x, "mask": mask & mine[:, None]})
        total = jax.tree.map(jnp.add, total, own)
        at = mine & mask[:, 0]
        assert_close([got[k][at] for k in ("y", "dx")], [wanted[k][at] for k in ("y", "dx")], atol=2e-3)
        for i in group:
            assert_close(jax.tree.map(lambda v, i=i: v[i], got["new"]), jax.tree.map(lambda v: v[0], wanted["new"]))
    assert_close(d_params, total, atol=2e-3)
    chex.assert_tree_all_finite(got)
