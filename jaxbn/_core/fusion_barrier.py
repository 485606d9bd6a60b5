"""Barriers against fusion, chosen where JAX lowers a program, never by the devices that the tracing process sees."""

from typing import Any

import jax
from jax import lax

from jaxbn._core.reduction import varying_axes


# Under `jit` since layers of the same types then share one trace, and an eager call is compiled once.
@jax.jit
def fusion_barrier(*arrays: Any) -> Any:
    """Return the arrays; on a CPU, XLA fuses and shares nothing across this point.

    XLA for CPUs stores a value that several sums share, such as a difference or a wider dtype, and writing it takes
    longer than computing it twice; per-feature values it recomputes for every entry. On accelerators one fused pass
    makes all sums of one difference.
    """
    # As varying as a barrier makes them, on every platform.
    varying = frozenset().union(*map(varying_axes, arrays))
    missing = [tuple(varying - varying_axes(a)) for a in arrays]
    arrays = tuple(lax.pcast(a, names, to="varying") if names else a for a, names in zip(arrays, missing, strict=True))
    return lax.platform_dependent(*arrays, cpu=lambda *a: lax.optimization_barrier(a), default=lambda *a: a)
