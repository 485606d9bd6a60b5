"""Compute by jaxbn what fuzz.py expects of a random layer; seeds that share a program compile it once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
from fuzz_layers import GROUPS, PLAIN, SHARED, VALUES, Inputs, Layer


def compute(layer: Layer, given: Inputs, seed: int) -> dict[str, np.ndarray]:
    """Return the same by jaxbn, in the layer's way of running."""
    import jax.numpy as jnp
    from ways import ONE
    from ways import WAYS as ALL

    import jaxbn

    ndim, k = given.x.ndim, len(layer.features)

    def placed(v, dtype=layer.dtype):
        v = np.moveaxis(v, range(ndim - k, ndim), range(1, 1 + k)) if layer.first else v
        return jnp.asarray(v, dtype)

    params = jaxbn.BatchNormParams(*(None if v is None else jnp.asarray(v, jnp.float32) for v in given[5:7]))
    state = jaxbn.BatchNormState(*(jnp.asarray(v, jnp.float32) for v in given[7:9]), jnp.int32(given.count))
    parts = {name: placed(getattr(given, name)) for name in ("x", "dy", "direction")}
    if given.residual is not None:
        parts["residual"] = placed(given.residual)
    if given.mask is not None:
        parts["mask"] = placed(given.mask, bool)
    way = next((w for w in ALL if w.name == layer.way), ONE)
    program = layer._replace(**{name: PLAIN[name] for name in VALUES})
    member = _make_member(program, way, _Constant(seed // SHARED, state) if layer.constant else None)
    whole = {"params": params, "state": state}
    if layer.way == "eager":
        found, (d_params,) = member(whole, parts)
    else:
        found, (d_params,) = way._replace(transform=partial(_transform, way.transform)).run(member, whole, parts)
    back = {n: np.asarray(found[n]).astype(np.float64) for n in found}
    for n in ("y", "dx", "ddx"):
        back[n] = np.moveaxis(back[n], range(1, 1 + k), range(ndim - k, ndim)) if layer.first else back[n]
    for n, v in zip(("dscale", "dbias"), d_params, strict=True):
        if v is not None:
            back[n] = np.asarray(v, np.float64)
    return back


@dataclass(frozen=True)
class _Constant:
    """A state that is compiled in, equal to that of another seed of the same program."""

    program: int
    state: Any = field(compare=False)


@lru_cache(maxsize=1)
def _transform(transform: Callable[[Any], Any], member: Any) -> Any:
    return transform(member)


@lru_cache(maxsize=1)
def _make_member(layer: Layer, way: Any, constant: _Constant | None) -> Callable[..., Any]:
    """Return the program of a layer for one member; the same object for all seeds that share it."""
    import jax
    import jax.numpy as jnp

    import jaxbn

    ndim, k = 1 + len(layer.positions) + len(layer.features), len(layer.features)
    momentum = {"zero_debiased": jaxbn.zero_debiased(0.9), "cumulative_average": jaxbn.cumulative_average}
    options: dict[str, Any] = dict(
        axis=tuple(range(1, 1 + k)) if layer.first else tuple(range(ndim - k, ndim)),
        momentum=momentum.get(layer.momentum) or float(layer.momentum),
        axis_name=way.axis_name,
        axis_index_groups=None if layer.groups == "none" else GROUPS[layer.groups],
        ghost_batches=layer.ghost,
        renorm=jaxbn.Renorm() if layer.renorm else None,
        activation={"none": None, "tanh": jnp.tanh, "relu": jax.nn.relu}[layer.activation],
    )

    def member(whole, parts):
        mask, state = parts.get("mask"), whole["state"] if constant is None else constant.state

        def loss(params, x):
            y, new = jaxbn.bn_apply(params, state, x, True, mask=mask, residual=parts.get("residual"), **options)
            weighed = y.astype(jnp.float32) * parts["dy"].astype(jnp.float32)
            return jnp.sum(weighed if mask is None else jnp.where(mask, weighed, 0)), (y, new)

        def gradient(x):
            return jax.grad(loss, argnums=(0, 1), has_aux=True)(whole["params"], x)

        direction = parts["direction"] if mask is None else jnp.where(mask, parts["direction"], 0)
        ((d_params, dx), (y, new)), ((_, ddx), _) = jax.jvp(gradient, (parts["x"],), (direction.astype(layer.dtype),))
        if way.axis_name:
            d_params = jax.tree.map(lambda v: way.total(v), d_params)
        rows = parts["x"].shape[0]
        stats = {n: jnp.broadcast_to(getattr(new, n)[None], (rows, *layer.features)) for n in ("mean", "var")}
        return {"y": y, "dx": dx, "ddx": ddx} | stats, (d_params,)

    return member
