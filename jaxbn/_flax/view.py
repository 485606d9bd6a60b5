"""View a linen or an nnx model as the same object, for `fold`, `health` and `recalibrate`.

A view lists normalizations and kernels by path, reads and replaces their arrays, and runs the model with an observer at
each normalization. `jaxbn.linen._view` and `jaxbn.nnx._view` are the two views.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import check
from jaxbn._core.moments import Moments
from jaxbn._core.state import BatchNormParams, BatchNormState
from jaxbn._flax.dtypes import choose_output_dtype
from jaxbn._flax.forward import BATCH_NORM, call_batch_norm, choose_affine, read_options
from jaxbn.whitening import WhitenState

Kind = Literal["batch", "whitening", "lstm"]


class Call(NamedTuple):
    """A call of a normalization while the model runs.

    Attributes:
        path: of the layer in the model.
        kind: `BatchNorm`, `IterNorm` or `BatchNormLSTMCell`.
        layer: the module, with its settings.
        proceed: makes the call as it is.
        row: the row of moments of the layer and the mode to normalize in, `(row, evaluate)`, if there is one.
        put_row: replaces the row.
        x, evaluate, options: of a batch normalization, the input, whether to use the running statistics, and the other
            arguments.
        axis: its feature axes in the order of the statistics.
        params, state: its arrays as this call sees them, with scale and bias of the call.
        dtype: of its output.
    """

    path: str
    kind: Kind
    layer: Any
    proceed: Callable[[], Any]
    row: tuple[jax.Array, bool] | None = None
    put_row: Any = None
    x: Any = None
    evaluate: Any = None
    options: Any = None
    axis: Any = None
    params: Any = None
    state: Any = None
    dtype: Any = None

    def normalize(self, evaluate: bool) -> jax.Array:
        """Return the output of the layer by the running statistics or by the batch, without an update."""
        # By the whole batch, with renormalization or ghost batches too: the statistics are to fit these outputs.
        whole = {"axis": self.axis, "renorm": None, "ghost_batches": 1}
        options = read_options(self.layer, BATCH_NORM) | whole
        y, _ = call_batch_norm(
            options,
            self.params,
            self.state,
            jnp.asarray(self.x),
            not evaluate,
            dtype=self.dtype,
            example_weight=getattr(self.layer, "example_weight", None),
            mask=self.options.get("mask"),
            residual=self.options.get("residual"),
            update=False,
        )
        return y


class Fold(NamedTuple):
    """A layer with the normalization `norm` in it: its new arrays, and the shift if it takes no bias."""

    norm: str
    kernel: jax.Array
    bias: jax.Array
    shift: jax.Array
    epsilon: float


class View(Protocol):
    """A model as the tools see it; an observer is called instead of each normalization and returns its output."""

    kinds: dict[str, Kind]
    """The normalizations by path, three for each LSTM cell."""
    kernels: list[str]
    """The paths of layers with a kernel."""
    epsilons: dict[str, float]
    """Epsilons by path, where they are known without a run."""

    def read(self, path: str, name: str) -> Any:
        """Return an array of a layer, or None."""
        ...

    def replace(self, arrays: Mapping[str, Mapping[str, Any]]) -> Any:
        """Return the model with other arrays in some layers; None removes one."""
        ...

    def replace_folded(self, folds: Mapping[str, Fold], drop: bool) -> Any:
        """Return the model with folded layers, their normalizations the identity, or dropped."""
        ...

    def run(self, x: Any, observe: Any = None, after: Any = None) -> Any:
        """Call the model on `x`; `after(path, layer, output)` is called after other layers."""
        ...

    def compile_rows(self, observe: Any) -> Callable[[Mapping[str, Any], bool, Any], dict[str, jax.Array]]:
        """Compile `rows(states, evaluate, batch)`: run the model, return the rows of moments by path."""
        ...


def read_params(read: Callable[[str], Any]) -> BatchNormParams:
    """Read scale and bias by name."""
    return BatchNormParams(read("scale"), read("bias"))


def read_state(read: Callable[[str], Any]) -> Any:
    """Read the running statistics by name, of a whitening or of a batch normalization."""
    kind = BatchNormState if read("cov") is None else WhitenState
    return kind(*map(read, kind._fields))


def select_held(view: View, path: str, state: Any) -> dict[str, Any]:
    """Return the arrays of `state` that the layer holds: flax's keeps no count."""
    return {name: value for name, value in state._asdict().items() if view.read(path, name) is not None}


def make_call(
    call: Call, read: Callable[[str], Any], promotes: bool, x: Any, use_running_average: Any = None, **options: Any
) -> Call:
    """Complete the `Call` of a batch normalization by its arguments; `promotes` says if its statistics promote x."""
    layer = call.layer
    domains, axes = getattr(layer, "num_domains", None), check.axes(layer.axis, np.ndim(x))
    params = BatchNormParams(*(choose_affine(n, read(n), options.get(n), domains) for n in ("scale", "bias")))
    state = read_state(read)._replace(count=jnp.zeros((), jnp.int32))
    dtype = choose_output_dtype(
        jnp.asarray(x), *params, *((state.mean, state.var) if promotes else ()), dtype=layer.dtype
    )
    given = layer.use_running_average if use_running_average is None else use_running_average
    return call._replace(
        x=x,
        evaluate=getattr(layer, "frozen", False) or given,
        options=options,
        axis=axes if promotes else tuple(sorted(axes)),
        params=params,
        state=state,
        dtype=dtype,
    )


def make_row(state: Any) -> jax.Array:
    """Return a row of moments before the first batch: the arrays of `Moments` along a last axis, zeros."""
    return jnp.zeros((*state.var.shape, len(Moments._fields)), check.accumulation_dtype(state.var.dtype))


def check_array(path: str, name: str, value: Any) -> Any:
    """Return `value` if it is an array or None, as a layer's are."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, type(None))):
        raise TypeError(
            f"The model must hold arrays; {name!r} of {path or 'the layer'!r} is a {type(value).__name__}. Initialize "
            "or restore it first."
        )
    return value


def check_function(name: str, value: Any, module: type, example: str) -> Any:
    """Return `value` if it is a function, and not the model itself."""
    if not callable(value) or isinstance(value, module):
        raise TypeError(f"`{name}` must be a function that calls the model, `{example}`; got a {type(value).__name__}.")
    return value


def unwrap_compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the plain function of a compiled one: a compiled function runs without its observers."""
    while hasattr(call, "lower") and hasattr(call, "__wrapped__"):
        call = call.__wrapped__  # type: ignore[attr-defined]
    return call
