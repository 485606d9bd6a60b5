"""One condition for all members under `vmap`: whether it holds for any of them.

`lax.cond` on a condition of each member becomes a selection, which runs both branches. Where the rare branch is right
for all members, one condition for all keeps it rare.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

any_member_p = Primitive("any_member")


def any_member(condition: jax.Array, varying: frozenset[str], names: tuple[str, ...]) -> jax.Array:
    """Return whether a scalar condition holds for any member of the `vmap`s around it.

    And if the branches have collectives over `names`, for any device: `varying` are the mapped axes along which the
    condition may differ, as far as its type knows.
    """
    others = (varying or frozenset(jax.sharding.get_abstract_mesh().manual_axes)) - set(names)
    if names and others:
        condition = lax.pmax(condition.astype(jnp.float32), tuple(sorted(others))) > 0
    return any_member_p.bind(condition)


any_member_p.def_impl(lambda condition: condition)
any_member_p.def_abstract_eval(lambda condition: condition)
mlir.register_lowering(any_member_p, lambda ctx, condition: [condition])
batching.primitive_batchers[any_member_p] = lambda args, dims: (
    any_member_p.bind(jnp.any(args[0], dims[0])),
    None,
)
