"""The program of a case: a training step, the shapes and shardings that it is compiled for, and what came of it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn.linen
from experiments.benchmark import networks
from experiments.compiled import cases
from experiments.compiled.cases import Case
from experiments.compiled.counting import count_collectives, count_moved, has_loop
from experiments.compiled.targets import H100, TARGETS, Target

EXAMPLES, SIZE, CHANNELS = 32, 28, 128  # of each device, for the layer alone and the net
IMAGES, PIXELS, CLASSES = 64, 224, 1000  # of each device, for ResNet-50
RATE = 0.1
DATA, MODEL, MODELS = "data", "model", 4
SPECS = {
    cases.BATCH: P(DATA),
    cases.BOTH: P((DATA, MODEL)),
    cases.FEATURES: P(DATA, None, None, MODEL),
    cases.ROWS: P(DATA, MODEL),
}
Layer = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]  # in training: `(params, stats, x) -> (y, new stats)`


class Program(NamedTuple):
    """A step to compile, its abstract arguments, and the bytes that a device holds of x."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Mesh
    array_bytes: float


def measure_case(case: Case) -> dict[str, Any]:
    """Return what the compiler made of a case.

    `moved_bytes` is that of the steady state, in which the second pass that jaxbn makes in its first steps and after
    jumps is not taken; `moved_bytes_rare` that of the program with it. Temporaries and collectives are the program's.
    """
    lowered, array = _lower(case)
    with never_repeating():
        steady, _ = _lower(case)
    repeats = lowered.as_text() != steady.as_text()
    with ThreadPoolExecutor() as pool:  # each takes one core
        compiled, *others = pool.map(lambda program: program.compile(), [lowered, steady][: 1 + repeats])
    usual = others[0] if repeats else compiled
    if has_loop(usual.as_text()):
        raise ValueError("the program has a loop or a branch beside `jax.lax.while_loop`: no steady state")
    return {
        "array_bytes": array,
        "moved_bytes": _moved(case, usual),
        "moved_bytes_rare": _moved(case, compiled) if repeats else None,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": {kind: sent._asdict() for kind, sent in count_collectives(compiled.as_text()).items()},
    }


@contextmanager
def never_repeating() -> Iterator[None]:
    """Compile `jax.lax.while_loop` as if its condition were false: in jaxbn it is the rare second pass."""
    while_loop = jax.lax.while_loop
    jax.lax.while_loop = lambda condition, body, start: start
    try:
        yield
    finally:
        jax.lax.while_loop = while_loop


def _lower(case: Case) -> tuple[Any, float]:
    """Return what a case's compiler is given, and the bytes that a device holds of x."""
    jax.clear_caches()  # no trace from before `jax.lax.while_loop` was another
    program = build_program(case)
    with jax.set_mesh(program.mesh):
        return jax.jit(program.step, donate_argnums=0).lower(*program.arguments), program.array_bytes


def _moved(case: Case, compiled: Any) -> float:
    """Return the compiler's own count of the bytes moved; for GPUs, for which it makes none, the count by operation."""
    if case.kind == "tpu":
        return compiled.cost_analysis()["bytes accessed"]
    return count_moved(compiled.as_text())


def build_program(case: Case) -> Program:
    """Return the program of a case."""
    target = TARGETS[case.target]
    flat = case.layout == cases.BATCH
    shape, names = ((target.devices,), (DATA,)) if flat else ((target.devices // MODELS, MODELS), (DATA, MODEL))
    mesh = make_mesh(target, shape, names, explicit=case.way == cases.EXPLICIT)
    spec, dtype = SPECS[case.layout], jnp.dtype(case.dtype)
    axis = DATA if case.way == cases.SHARD_MAP else None
    replicated = P(MODEL) if case.layout == cases.FEATURES else P()  # in the layer alone, all else is by feature
    if case.program == cases.RESNET:
        images = jax.ShapeDtypeStruct((target.devices * IMAGES, PIXELS, PIXELS, 3), dtype)
        labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
        model = networks.ResNet(NORMS[case.contender], (3, 4, 6, 3))
        found = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, *images.shape[1:]), dtype))
        variables = found["params"], found["batch_stats"]
        step, inputs, outputs = descend(classify(model)), (images, labels), P()
    else:
        x = images = jax.ShapeDtypeStruct((target.devices * EXAMPLES, SIZE, SIZE, CHANNELS), dtype)
        layer, variables = build_layer(case, axis)
        if case.program == cases.NET:
            kernel = jax.ShapeDtypeStruct((3, 3, CHANNELS, CHANNELS), jnp.float32)
            params, stats = variables
            variables = [(kernel, params)] * cases.NET_LAYERS, [stats] * cases.NET_LAYERS
            step, inputs, outputs = descend(convolve(layer, axis)), (x,), P()
        else:
            step, inputs, outputs = differentiate(layer), (x, x), (spec, P(), P(), spec)
    if axis is not None:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), *[spec] * len(inputs)), out_specs=outputs)
    arguments = (_placed(variables, mesh, replicated), *_placed(inputs, mesh, spec))
    return Program(step, arguments, mesh, images.size * dtype.itemsize / target.devices)


def build_layer(case: Case, axis: str | None) -> tuple[Layer, tuple[Any, Any]]:
    """Return the layer of a case with what follows it, and the shapes of its parameters and statistics."""
    activation = nn.relu if case.epilogue == "ReLU" else None
    if case.contender == cases.NONE:
        return lambda params, stats, x: (x if activation is None else activation(x), stats), ({}, {})
    common = {"use_running_average": False, "dtype": jnp.dtype(case.dtype), "axis_name": axis}
    if case.ours:
        module, after = jaxbn.linen.BatchNorm(**common, activation=activation), None
    else:
        module, after = nn.BatchNorm(**common, use_fast_variance=case.contender != cases.STABLE), activation

    def layer(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y if after is None else after(y)), new["batch_stats"]

    x = jax.ShapeDtypeStruct((2, CHANNELS), common["dtype"])
    # Where there are no devices to share statistics with yet, the axis has no meaning.
    variables = jax.eval_shape(module.clone(axis_name=None).init, jax.random.key(0), x)
    return layer, (variables["params"], variables["batch_stats"])


def differentiate(layer: Layer) -> Callable[..., Any]:
    """Return the layer's step: output, new statistics, and the derivatives of parameters and x given that of y."""

    def step(variables: tuple[Any, Any], x: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        params, stats = variables
        y, vjp, new = jax.vjp(lambda params, x: layer(params, stats, x), params, x, has_aux=True)
        return y, new, *vjp(dy)

    return step


def descend(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the step of gradient descent on `loss(params, stats, *inputs) -> (value, new stats)`."""

    def step(variables: tuple[Any, Any], *inputs: jax.Array) -> tuple[Any, ...]:
        params, stats = variables
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, *inputs)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), new, value

    return step


def convolve(layer: Layer, axis: str | None) -> Callable[..., Any]:
    """Return the loss of the net of convolutions."""

    def loss(params: list[Any], stats: list[Any], x: jax.Array) -> tuple[jax.Array, list[Any]]:
        news = []
        for (kernel, own), old in zip(params, stats, strict=True):
            x = jax.lax.conv_general_dilated(
                x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, new = layer(own, old, x)
            news.append(new)
        value = jnp.mean(jnp.mean(x, (1, 2)).astype(jnp.float32) ** 2)
        return (value if axis is None else jax.lax.pmean(value, axis)), news

    return loss


def classify(model: nn.Module) -> Callable[..., Any]:
    """Return the loss of a classifier."""

    def loss(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        y, new = model.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
        assert isinstance(y, jax.Array)
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, CLASSES) * nn.log_softmax(y), -1)), new["batch_stats"]

    return loss


def _swapped(x: jax.Array, residual: jax.Array | None, relu: bool, inside: bool = False) -> jax.Array:
    inside = inside and relu and residual is None
    layer = jaxbn.linen.BatchNorm(use_running_average=False, dtype=x.dtype, activation=nn.relu if inside else None)
    return networks.follow(layer(x), residual, relu and not inside)


NORMS: dict[str, networks.Norm] = {
    cases.SWAPPED: _swapped,
    cases.INSIDE: partial(_swapped, inside=True),
    cases.FLAX: networks.theirs,
}


def _placed(shapes: Any, mesh: Mesh, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), shapes)


def make_mesh(target: Target, shape: tuple[int, ...], names: tuple[str, ...], explicit: bool) -> Any:
    """Return a mesh of the target's devices."""
    of_kind: dict[str, Any] = {
        "platform": "cuda",
        "topology_name": "",
        "target_config": H100,
        "topology": target.topology,
    }
    if target.kind == "tpu":
        of_kind = {"platform": "tpu", "topology_name": target.topology, "chips_per_host_bounds": [2, 2, 1]}
    described = topologies.get_topology_desc(**of_kind)
    devices = np.array(described.devices[: target.devices]).reshape(shape)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(devices, names, axis_types=(kind,) * len(names))
