"""Arrays as NumPy arrays, also where several processes hold a part each."""

from typing import Any

import jax
import numpy as np


def fetch_array(v: Any, dtype: Any = None) -> np.ndarray:
    """Return all of `v` as a NumPy array; where several processes hold parts of it, each of them must call this."""
    if isinstance(v, jax.Array) and not (v.is_fully_addressable or v.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather  # not imported where one process holds all of it

        v = process_allgather(v, tiled=True)
    return np.asarray(v, dtype)
