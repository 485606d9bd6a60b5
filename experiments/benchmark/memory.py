"""Count memory: what the backward pass holds, XLA's temporary memory, and passes over memory. No times, no luck."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.benchmark import accuracy, hlo, torch_layers
from experiments.benchmark.layers import LAYERS, arguments, program
from experiments.benchmark.sizes import EPILOGUES, OURS, TORCH, Case, Plan

KEPT = (16384, 64)  # large, for what depends on that
SCANNED = (8, 16, 16, 32)


def kept(name: str, case: Case) -> float:
    """Return the bytes that the backward pass of one layer holds, per element of x; each array once."""
    host = accuracy.inputs(case, 0.0)
    if name == TORCH:
        saved = torch_layers.kept(host, case.dtype, case.relu)
    else:
        layer = LAYERS[name](case.shape[-1])
        params, state, x, residual, _ = arguments(layer, host)
        _, backward = jax.vjp(lambda p, x, r: layer.apply(p, state, x, r, True, case.relu)[0], params, x, residual)
        saved = sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(backward)}.values())
    return saved / np.prod(case.shape)


def one_layer(name: str, case: Case) -> dict[str, float]:
    """Return two measures of the compiled forward and backward pass of a layer alone.

    Its temporary bytes per element of x, and how many arrays of x's size its operations read and write.
    """
    layer = LAYERS[name](case.shape[-1])
    step = jax.jit(program(layer, "forward+backward", case.relu))
    compiled = step.lower(*arguments(layer, accuracy.inputs(case, 0.0))).compile()
    size = math.prod(case.shape)
    return {
        "temporary, layer": temporary_bytes(compiled) / size,
        "arrays moved": moved(compiled.as_text() or "", size),
    }


def scanned(name: str, case: Case, layers: int, rematerialized: bool = False) -> float:
    """Return the temporary bytes of the gradient of `layers` 3x3 convolutions, each with its layer, under `lax.scan`.

    Per element of x and layer. A loop keeps what it carries: rematerialized, it carries the layer's input, and the rest
    is computed again.
    """
    features = case.shape[-1]
    layer = LAYERS[name](features)
    params, state, x, *_ = arguments(layer, accuracy.inputs(case, 0.0))
    stacked = jax.tree.map(lambda v: jnp.stack([v] * layers), (params, state))
    kernels = jnp.full((layers, 3, 3, features, features), 0.1 / features, jnp.float32)

    def convolved(x, kernel):
        kernel = kernel.astype(x.dtype)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def block(x, own):
        (params, kernel), state = own
        if rematerialized:
            y, new = layer.apply(params, state, x, None, True, case.relu)
            return convolved(y, kernel), new
        return layer.apply(params, state, convolved(x, kernel), None, True, case.relu)

    def loss(trained, states, x):
        policy = jaxbn.save_inputs if name == OURS else None
        body = jax.checkpoint(block, policy=policy, prevent_cse=False) if rematerialized else block
        y, new = jax.lax.scan(body, x, (trained, states))
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new

    step = jax.jit(jax.grad(loss, has_aux=True)).lower((stacked[0], kernels), stacked[1], x)
    return temporary_bytes(step.compile()) / layers / np.prod(case.shape)


def temporary_bytes(compiled: Any) -> int:
    """Return the temporary memory of a compiled program."""
    return compiled.memory_analysis().temp_size_in_bytes


def moved(program: str, elements: int) -> int:
    """Return how many arrays of `elements` entries the operations of an optimized program read and write.

    Each operation of the entry computation, fused as the compiler fused it, reads its operands from memory and writes
    its results there; an operand that is named twice is read once. What an operation does inside is not counted.
    """
    entry, computations = hlo.parse_program(program)
    large: dict[str, int] = {}
    total = 0
    for i in computations[entry]:
        large[i.name] = [size for _, size in hlo.list_arrays(i.types)].count(elements)
        if i.operation not in hlo.FREE:
            total += sum(large.get(o, 0) for o in set(i.operands)) + large[i.name]
    return total


def rows(plan: Plan, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the memory of one layer and of many under `lax.scan`, and the arrays that one layer moves."""
    for dtype, epilogue in product(plan.dtypes, EPILOGUES):
        case, labels = Case(KEPT, dtype, epilogue), {"dtype": dtype, "epilogue": epilogue}
        for name in names:
            yield {"measure": "kept", "contender": name, **labels, "value": kept(name, case)}
            if epilogue in plan.epilogues and name in LAYERS:
                for measure, value in one_layer(name, case).items():
                    yield {"measure": measure, "contender": name, **labels, "value": value}
    for dtype, name in product(plan.dtypes, (OURS, "flax", "flax, stable")):
        for measure, rematerialized in (("temporary, scan", False), ("temporary, scan, rematerialized", True)):
            value = scanned(name, Case(SCANNED, dtype, "relu"), plan.scanned, rematerialized)
            yield {"measure": measure, "contender": name, "dtype": dtype, "value": value}
