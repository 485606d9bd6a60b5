"""Measure what the README states about exactness, memory and communication, beside `flax.linen.BatchNorm`.

    python -m experiments.measure              print the table
    python -m experiments.measure README.md    and put it between the marks in that file

The figures are deterministic: no times. What is compared is each layer in its ordinary use, on the CPU: errors, memory
and collectives of compiled programs; what is kept for the backward pass where `jax.vjp` hands it out.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn.linen

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "flax": nn.BatchNorm,
    "flax, `use_fast_variance=False`": lambda **kw: nn.BatchNorm(use_fast_variance=False, **kw),
    "jaxbn": jaxbn.linen.BatchNorm,
}
ROWS, FEATURES, DEVICES = 65536, 8, 8
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def train(layer: nn.Module, variables, x, **kwargs):
    """The layer's training output and new statistics."""
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **kwargs)


def variables_of(layer: nn.Module, x):
    """Fresh variables."""
    return layer.init(jax.random.key(0), x, use_running_average=False)


def error(make: Callable[..., nn.Module], offset: float) -> float:
    """Largest error of the training output against float64, at mean/std `offset`."""
    x = (np.random.default_rng(0).standard_normal((ROWS, FEATURES)) + offset).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    layer = make()
    y = jax.jit(lambda v, x: train(layer, v, x)[0])(variables_of(layer, x), x)
    return float(np.abs(np.asarray(y, np.float64) - exact).max())


def masked_error(make: Callable[..., nn.Module]) -> float:
    """Largest error of the synced batch mean when eight devices hold 1 to 8 unmasked rows each."""
    x = np.random.default_rng(0).standard_normal((DEVICES, 8, 4)) + np.arange(DEVICES)[:, None, None]
    mask = np.arange(8)[None, :, None] <= np.arange(DEVICES)[:, None, None]
    x, layer = x.astype(np.float32), make(axis_name="devices", momentum=0.0)
    variables = variables_of(layer, x[0])
    step = jax.vmap(lambda x, m: train(layer, variables, x, mask=m)[1], axis_name="devices")
    mean = np.asarray(step(x, mask)["batch_stats"]["mean"][0])
    exact = np.mean(x.astype(np.float64), axis=(0, 1), where=mask)
    return float(np.abs(mean - exact).max())


def kept_bytes(make: Callable[..., nn.Module], dtype, relu: bool) -> float:
    """Bytes kept for the backward pass, per element of x."""
    x = jnp.ones((4096, 64), dtype)
    own = make is LAYERS["jaxbn"]
    layer = make(dtype=dtype, **({"activation": jax.nn.relu} if own and relu else {}))
    variables = variables_of(layer, x)

    def forward(params, x):
        y = train(layer, {**variables, "params": params}, x)[0]
        return jax.nn.relu(y) if relu and not own else y

    _, backward = jax.vjp(forward, variables["params"], x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward)) / x.size


def scan_memory(make: Callable[..., nn.Module], dtype) -> float:
    """Temporary memory of the compiled gradient of Dense-norm-ReLU layers under `lax.scan`, per element and layer.

    The difference between twelve and four layers, so that what does not grow with depth is left out.
    """
    x = jnp.ones((4096, 16), dtype)
    own = make is LAYERS["jaxbn"]
    layer = make(dtype=dtype, **({"activation": jax.nn.relu} if own else {}))
    variables = variables_of(layer, x)

    def loss(kernels, x):
        def block(x, kernel):
            y = train(layer, variables, x @ kernel.astype(dtype))[0]
            return (y if own else jax.nn.relu(y)), None

        return jnp.mean(jnp.square(jax.lax.scan(block, x, kernels)[0].astype(jnp.float32)))

    def temporary(layers):
        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((layers, 16, 16)), x).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    return (temporary(12) - temporary(4)) / 8 / x.size


def collectives(make: Callable[..., nn.Module], way: str) -> int:
    """All-reduces in the compiled training step of one layer, forward and backward, on eight devices."""
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    layer = make(axis_name="devices" if way == "shard_map" else None)
    x = jnp.ones((8 * DEVICES, 4))
    variables = make().init(jax.random.key(0), x, use_running_average=False)

    def loss(params, x):
        y, new = train(layer, {**variables, "params": params}, x)
        return jnp.sum(jnp.sin(y)), new

    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if way == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("devices")), out_specs=((P(), P("devices")), P()))
    x = jax.device_put(x, NamedSharding(mesh, P("devices")))
    text = jax.jit(step).lower(variables["params"], x).compile().as_text() or ""
    return len(re.findall(r"\ball-reduce(?:-start)?\(", text))


def table() -> str:
    """The figures as a Markdown table."""
    rows: dict[str, tuple[str, Callable[..., Any]]] = {}
    for offset in (0, 1e2, 1e4, 1e6):
        rows[f"error of y, mean/std = {offset:g}"] = ("{:.0e}", partial(error, offset=offset))
    rows["error of the mean, unequal masks on 8 devices"] = ("{:.0e}", masked_error)
    for dtype in (jnp.float32, jnp.bfloat16):
        for relu in (False, True):
            name = f"bytes kept for the backward pass, per element, {jnp.dtype(dtype)}{' + ReLU' if relu else ''}"
            rows[name] = ("{:.1f}", partial(kept_bytes, dtype=dtype, relu=relu))
    for dtype in (jnp.float32, jnp.bfloat16):
        name = f"temporary bytes per element and layer, {jnp.dtype(dtype)} Dense-norm-ReLU under `lax.scan`"
        rows[name] = ("{:.1f}", partial(scan_memory, dtype=dtype))
    for way in ("shard_map", "sharded jit"):
        rows[f"collectives per training step, {way}"] = ("{}", partial(collectives, way=way))
    lines = ["| | " + " | ".join(LAYERS) + " |", "|---" * (len(LAYERS) + 1) + "|"]
    for name, (form, measure) in rows.items():
        lines.append(f"| {name} | " + " | ".join(form.format(measure(make)) for make in LAYERS.values()) + " |")
    versions = f"jax {jax.__version__}, flax {__import__('flax').__version__}, CPU, {ROWS} rows x {FEATURES} features"
    return "\n".join([*lines, "", f"Measured with {versions}, by `python -m experiments.measure`."])


def main() -> None:
    """Print the table, and put it into the file that was named."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    text = table()
    print(text)
    for name in sys.argv[1:]:
        page = Path(name).read_text()
        if not all(mark in page for mark in MARKS):
            raise SystemExit(f"{name} must hold the marks {MARKS[0]} and {MARKS[1]}, between which the table goes.")
        before, rest = page.split(MARKS[0], 1)
        Path(name).write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")


if __name__ == "__main__":
    main()
