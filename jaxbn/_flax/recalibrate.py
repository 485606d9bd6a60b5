"""Recalibrate the running statistics of a model: precise batch normalization, over either view."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core.fetch import fetch_array
from jaxbn._core.moments import Moments
from jaxbn._flax.view import Call, View, read_state, select_held
from jaxbn.statistics._pool_batches import collect_moments
from jaxbn.statistics._pool_batches import recalibrate_states as recalibrate_layers


def recalibrate_states(
    view: View, batches: Iterable[Any], source_weight: ArrayLike, layer_by_layer: bool, progress: bool
) -> dict[str, dict[str, Any]]:
    """Return the statistics of all batches for each batch normalization; one that is not called keeps its own."""
    if hasattr(batches, "ndim"):  # its examples would be taken for batches of one, without an error
        raise TypeError(
            "`batches` must be an iterable of batches; got an array. A single batch goes into a list, `[batch]`; an "
            "array of batches is `list(batches)`."
        )
    states: dict[str, Any] = {}
    for path, kind in view.kinds.items():
        if kind == "batch":
            state = read_state(partial(view.read, path))
            states[path] = state._replace(count=np.int32(0) if state.count is None else state.count)
    if view.kinds and not states:
        raise refuse(next(iter(view.kinds)), "which is no BatchNorm")
    rows_of = view.compile_rows(measure_moments)

    def moments_of(states, evaluate, batch):
        check_batch(batch)
        try:
            rows = rows_of(states, evaluate, batch)
        except Exception as error:  # the model's own
            if isinstance(batch, (tuple, list)):
                error.add_note(
                    "`recalibrate` hands the whole batch to `apply` or `call`, here a tuple. Of inputs and labels take "
                    "the inputs there: `model(batch[0])`."
                )
            raise
        return {path: Moments(*np.moveaxis(fetch_array(row), -1, 0)) for path, row in rows.items()}

    states = recalibrate_layers(moments_of, states, batches, source_weight, layer_by_layer, progress)
    return {path: select_held(view, path, state) for path, state in states.items()}


def check_batch(batch: Any) -> None:
    """Check that a batch is a tree of arrays."""
    for leaf in jax.tree.leaves(batch):
        fits = isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex))
        if not fits or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU"):
            raise TypeError(
                f"`batches` must hold trees of arrays; got a {type(leaf).__name__} in one. A single batch goes into a "
                "list, `[batch]`; make arrays of other libraries' tensors by `np.asarray`."
            )


def measure_moments(call: Call) -> Any:
    """Pool the moments of the input into the row of the layer, and normalize in the mode of the row."""
    layer = call.layer
    if call.kind != "batch":
        raise refuse(call.path, f"of class {type(layer).__name__}")
    if call.row is None or getattr(layer, "frozen", False):
        return call.proceed()
    if getattr(layer, "num_domains", None) is not None:
        raise refuse(call.path, f"a BatchNorm of num_domains={layer.num_domains}")
    row, evaluate = call.row
    mask, update = call.options.get("mask"), call.options.get("update", True)
    call.put_row(collect_moments(row, call.x, call.axis, mask, layer.axis_name, update))
    return call.normalize(evaluate)


def refuse(path: str, description: str) -> ValueError:
    """Make the error for a layer whose statistics cannot be made from moments."""
    return ValueError(
        "`recalibrate` must meet BatchNorm layers of one domain alone, or the others would keep statistics that do not "
        f"fit; got {path or 'the layer'!r}, {description}. Run the model over the data in training mode instead, "
        "without changing weights, with `momentum=jaxbn.cumulative_average` and each `count` at 0."
    )
