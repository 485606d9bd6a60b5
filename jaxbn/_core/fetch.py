"""Arrays as NumPy arrays, also where several processes hold a part each."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def fetch_array(v: Any, dtype: Any = None) -> np.ndarray:
    """Return all of `v` as a NumPy array; where several processes hold parts of it, each of them must call this.

    Raises:
        TypeError: `v` holds no numbers: it is traced, or a shape and a dtype alone.
    """
    if isinstance(v, (Tracer, jax.ShapeDtypeStruct)):
        kind = "a traced one" if isinstance(v, Tracer) else "a shape and a dtype alone"
        raise TypeError(
            f"The arrays must hold numbers here; got {kind}. Call this outside `jax.jit` and `jax.eval_shape`."
        )
    if isinstance(v, jax.Array) and not (v.is_fully_addressable or v.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather  # not imported where one process holds all of it

        v = process_allgather(v, tiled=True)
    return np.asarray(v, dtype)
