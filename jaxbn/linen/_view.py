"""View a linen model: its variables, and a function that applies it.

`nn.intercept_methods` shows the input of a normalization. For statistics that must leave compiled code, a variable
beside the running statistics carries them, through `jit`, `shard_map`, `nn.scan` and `nn.remat` as these.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxbn._flax.view import (
    Call,
    Fold,
    Kind,
    check_array,
    check_function,
    make_call,
    make_row,
    select_held,
    unwrap_compiled,
)
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._iter_norm import IterNorm
from jaxbn.linen._lstm import BatchNormLSTMCell, is_of_cell
from jaxbn.linen._model import flatten_variables, unflatten_variables

# The variable that asks a layer for moments, by the mode to normalize in. No other program has it, so that no compiled
# program is taken for another.
_ROWS = ("jaxbn_moments_training", "jaxbn_moments_evaluation")
_METHODS = (inspect.unwrap(BatchNorm.__call__), inspect.unwrap(nn.BatchNorm.__call__))


class LinenView:
    """A linen model as the tools see it: a normalization is any layer with mean and var, or mean and cov."""

    def __init__(self, apply: Callable[[Any, Any], Any] | None, variables: Mapping[str, Any]):
        self.variables = variables
        self._apply: Any = apply
        self._flat = flatten_variables(variables, keep_empty_nodes=True)
        self.kinds: dict[str, Kind] = {}
        self.kernels = ["/".join(path[1:-1]) for path in self._flat if path[0] == "params" and path[-1] == "kernel"]
        self.epsilons: dict[str, float] = {}
        for path in (path[:-1] for path in self._flat if path[0] == "batch_stats" and path[-1] == "mean"):
            name = "/".join(path[1:])
            mean, cov = self.read(name, "mean"), self.read(name, "cov")
            if self.read(name, "var") is not None:
                self.kinds[name] = "lstm" if is_of_cell(self._flat, path) else "batch"
            elif cov is not None and self.read(name, "count") is not None and np.ndim(cov) == np.ndim(mean) + 2:
                self.kinds[name] = "whitening"

    def read(self, path: str, name: str) -> Any:
        """Return an array of a layer, or None; see `View`."""
        return check_array(path, name, nn.meta.unbox(self._flat.get(_key(path, name))))

    def replace(self, arrays: Mapping[str, Mapping[str, Any]]) -> "LinenView":
        """Return the model with other arrays, boxed as the old ones; see `View`."""
        flat = dict(self._flat)
        for path, values in arrays.items():
            for name, value in values.items():
                old = flat.pop(key := _key(path, name), None)
                if value is not None:
                    flat[key] = value if old is None else nn.meta.replace_boxed(old, value)
        return LinenView(self._apply, unflatten_variables(flat, self.variables))

    def replace_folded(self, folds: Mapping[str, Fold], drop: bool) -> "LinenView":
        """Return the model with folded layers; see `View`. Without a bias to take it the shift stays, as mean."""
        arrays: dict[str, dict[str, Any]] = {}
        for layer, fold in folds.items():
            has_bias = drop or self.read(layer, "bias") is not None
            arrays[layer] = {"kernel": fold.kernel} | ({"bias": fold.bias} if has_bias else {})
            mean, var = (self.read(fold.norm, name) for name in ("mean", "var"))
            one, zero = jnp.ones_like(var), jnp.zeros_like(mean)
            # sqrt(var + epsilon) is 1 to the last bit of float32.
            identity = {"scale": one, "bias": zero, "var": one - jnp.asarray(fold.epsilon, one.dtype)}
            identity["mean"] = zero if has_bias else -fold.shift
            held = {name: self.read(fold.norm, name) for name in (*identity, "count")}
            arrays[fold.norm] = {
                name: None if drop else jnp.asarray(identity.get(name, old), old.dtype)
                for name, old in held.items()
                if old is not None
            }
        return self.replace(arrays)

    def run(self, x: Any, observe: Any = None, after: Any = None) -> Any:
        """Apply the model to `x`; see `View`. Updates of `batch_stats` are left out of the output."""
        if observe is None:
            out = self._apply(self.variables, x)
        else:
            with nn.intercept_methods(partial(_intercept, observe, after)):
                out = unwrap_compiled(self._apply)(self.variables, x)
        return out if _updates(out) is None else out[0]

    def compile_rows(self, observe: Any) -> Callable[[Mapping[str, Any], bool, Any], dict[str, Any]]:
        """Compile a pass over a batch; see `View`."""
        measured: set[str] = set()

        def note(call):
            measured.add(call.path)
            return observe(call)

        def after(path, layer, _):
            ours = isinstance(layer, nn.BatchNorm) and not getattr(layer, "frozen", False)
            if ours and _read_row(layer) and path not in measured:
                raise TypeError(
                    f"{type(layer).__name__} has a `__call__` of its own that does not use BatchNorm's, so the input "
                    "of its statistics is not known. Call `super().__call__` in it, or write `batch_stats` yourself."
                )

        @jax.jit
        def run(variables, batch):
            with nn.intercept_methods(partial(_intercept, note, after)):
                out = self._apply(variables, batch)
            if (updates := _updates(out)) is None:
                raise TypeError(
                    "`apply` must return `(outputs, updates)` with `batch_stats` in the updates, as "
                    f'`model.apply(variables, x, mutable=["batch_stats"])` does; got {type(out).__name__}.'
                )
            flat = traverse_util.flatten_dict(updates)
            return {"/".join(path[:-1]): row for path, row in flat.items() if path[-1] in _ROWS}

        def rows_of(states, evaluate, batch):
            rows = {path: {_ROWS[evaluate]: make_row(state)} for path, state in states.items()}
            view = self.replace({path: select_held(self, path, state) | rows[path] for path, state in states.items()})
            rows = run(view.variables, batch)
            if rows.keys() != states.keys():
                raise TypeError("`apply` must return `batch_stats` whole, as the model updates them; some are missing.")
            return rows

        return rows_of


def check_apply(apply: Any) -> Any:
    """Return `apply` if it is a function of variables and an input."""
    return check_function("apply", apply, nn.Module, "lambda variables, x: model.apply(variables, x)")


def _key(path: str, name: str) -> tuple[str, ...]:
    kind = "params" if name in ("kernel", "scale", "bias") else "batch_stats"
    return (kind, *(path.split("/") if path else ()), name)


def _updates(out: Any) -> Any:
    """Return the `batch_stats` that the model returned beside its output, None without."""
    updated = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)
    return out[1].get("batch_stats") if updated else None


def _read_row(layer: Any) -> Any:
    """Return the name of the row of moments, the row, and the mode to normalize in."""
    name = next((name for name in _ROWS if layer.has_variable("batch_stats", name)), None)
    return name and (name, layer.get_variable("batch_stats", name), name == _ROWS[1])


def _intercept(observe: Any, after: Any, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Call `observe` instead of a normalization, and `after` after any other layer."""
    layer, path = context.module, "/".join(context.module.path)
    proceed = partial(call, *args, **kwargs)
    if context.method_name != "__call__":
        return proceed()
    if isinstance(layer, (IterNorm, BatchNormLSTMCell)):
        return observe(Call(path, "whitening" if isinstance(layer, IterNorm) else "lstm", layer, proceed))
    # A subclass may change the input on its way to the method that normalizes.
    if isinstance(layer, nn.BatchNorm) and inspect.unwrap(context.orig_method.func) in _METHODS:
        row = _read_row(layer)

        def put_row(new):
            if not layer.is_mutable_collection("batch_stats"):
                raise ValueError(
                    '`apply` must let `batch_stats` change: call `model.apply(..., mutable=["batch_stats"])`.'
                )
            layer.put_variable("batch_stats", row[0], new)

        if not layer.has_variable("batch_stats", "mean"):
            return proceed()
        made = Call(path, "batch", layer, proceed, row and row[1:], put_row)
        return observe(make_call(made, partial(_read_variable, layer), False, *args, **kwargs))
    y = proceed()
    if after is not None:
        after(path, layer, y)
    return y


def _read_variable(layer: Any, name: str) -> Any:
    return nn.meta.unbox(layer.variables.get(_key("", name)[0], {}).get(name))
