"""Diagnose the normalizations of a model, over either view."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn._core import check
from jaxbn._core.fetch import fetch_array
from jaxbn._core.state import BatchNormState
from jaxbn._flax.dtypes import widen_input
from jaxbn._flax.view import Call, Kind, View, read_params, read_state
from jaxbn.diagnostics._compare import Batch, Modes, compare_batch, run_modes
from jaxbn.diagnostics._health import judge_layer, require_concrete
from jaxbn.diagnostics._report import Health
from jaxbn.lstm._state import LSTMState


def check_model(view: View, x: Any, epsilon: float = 1e-5) -> Health:
    """Return the records of all normalizations, in the order of the calls; without `x` from their arrays alone."""
    epsilon = check.epsilon(epsilon, jnp.float32)
    batches: dict[str, list[Batch | None]] = {}
    epsilons: dict[str, float] = {}

    def observe(call: Call) -> Any:
        names = LSTMState._fields if call.kind == "lstm" else ("",)
        epsilons.update({"/".join(filter(None, (call.path, name))): call.layer.epsilon for name in names})
        seen = batches.setdefault(call.path, [])
        return compare_call(call, seen) if call.kind == "batch" else call.proceed()

    require_concrete(*jax.tree.leaves(x), *(view.read(path, "mean") for path in view.kinds))
    if x is not None:
        view.run(x, observe)
        jax.effects_barrier()  # for the reports of mapped layers
        found = [batch for seen in batches.values() for batch in seen]
        if found and not any(found):
            warnings.warn(
                "No layer could be compared with the batch: they run in a compiled function or in a loop, where arrays "
                "hold no numbers. Call the plain function, not the result of `jax.jit`.",
                stacklevel=3,
            )
    records = []
    for path in dict.fromkeys([*epsilons, *view.kinds]):
        if path in view.kinds:
            read = partial(view.read, path)
            state = match_state(path, view.kinds[path], read_state(read))
            at = (view.epsilons | epsilons).get(path, epsilon)
            records.append(judge_layer(path or "the layer", read_params(read), state, at, batches.get(path, [])))
    return Health(records)


def compare_call(call: Call, seen: list[Batch | None]) -> Any:
    """Normalize by the batch, and append the comparison with the running statistics to `seen`, None if traced.

    Under `jax.vmap` alone each member of the map reports its own numbers.
    """
    layer, x, mask, residual = call.layer, jnp.asarray(call.x), call.options.get("mask"), call.options.get("residual")
    arrays = (x, mask, residual, *call.params, call.state.mean, call.state.var)
    traced = any(isinstance(_unmap(v), Tracer) for v in arrays)
    fits = call.state.mean.shape == tuple(x.shape[a] for a in call.axis)
    if traced or not fits or jnp.iscomplexobj(x) or getattr(layer, "frozen", False):
        seen += [None] if traced else []
        return call.proceed()
    epsilon, activation = layer.epsilon, getattr(layer, "activation", None)
    more = {"axis": call.axis, "epsilon": epsilon, "mask": mask, "activation": activation, "residual": residual}
    modes = run_modes(call.params, call.state, widen_input(x, call.dtype), **more)
    if isinstance(_unmap(modes.training), Tracer):  # constants in a compiled function
        seen.append(None)
        return call.proceed()

    def report(modes: Modes, mask: Any) -> None:
        seen.append(compare_batch(modes, call.axis, epsilon, mask))

    if any(isinstance(v, Tracer) for v in (*modes, mask)):
        jax.debug.callback(report, modes, mask)
    else:
        report(modes, mask)
    return modes.training.astype(call.dtype)


def match_state(path: str, kind: Kind, state: Any) -> BatchNormState:
    """Return the statistics of any kind of normalization as those of a batch normalization."""
    require_concrete(*state)
    if kind == "batch":
        return state
    if kind == "whitening":  # the variances of its features
        var = np.diagonal(fetch_array(state.cov), axis1=-2, axis2=-1).reshape(np.shape(state.mean))
        return BatchNormState(state.mean, var, state.count)  # pyright: ignore[reportArgumentType]
    mean, var, count = (fetch_array(v).copy() for v in state)  # [*stack, max_steps, features]
    if path.split("/")[-1] == "recurrent_norm" and count.shape[-1] > 1:
        # h starts at zero, so that its product has no variance in the first step.
        var[..., 0, :] = np.maximum(var[..., 0, :], 1)
    # Steps that training has not reached use the last that it has.
    used = (count > 0) | ~np.any(count > 0, axis=-1, keepdims=True)
    return BatchNormState(mean[used], var[used], count[used])  # pyright: ignore[reportArgumentType]


def _unmap(v: Any) -> Any:
    """Return the array of which `jax.vmap` shows one entry."""
    while type(v).__name__ == "BatchTracer":
        v = v.val
    return v
