"""The program of a case: a training step, and the shapes and shardings that it is compiled for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn.linen
from experiments.benchmark import networks
from experiments.compiled import cases
from experiments.compiled.cases import Case
from experiments.compiled.targets import TARGETS, make_mesh

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
Variables = dict[str, Any]  # "params" and "batch_stats"
Layer = Callable[[Variables, jax.Array], tuple[jax.Array, Variables]]  # in training, with the new "batch_stats"


class Program(NamedTuple):
    """A step to compile, its abstract arguments, and the bytes that a device holds of x."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: jax.sharding.Mesh
    array_bytes: float


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
        variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, *images.shape[1:]), dtype))
        step, inputs, outputs = train_model(model), (images, labels), P()
    else:
        x = images = jax.ShapeDtypeStruct((target.devices * EXAMPLES, SIZE, SIZE, CHANNELS), dtype)
        layer, variables = build_layer(case, axis)
        if case.program == cases.NET:
            kernel = jax.ShapeDtypeStruct((3, 3, CHANNELS, CHANNELS), jnp.float32)
            variables = [(kernel, variables)] * cases.NET_LAYERS
            step, inputs, outputs = train_net(layer, axis), (x,), P()
        else:
            step, inputs, outputs = differentiate(layer), (x, x), (spec, P(), P(), spec)
    if axis is not None:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), *[spec] * len(inputs)), out_specs=outputs)
    arguments = (_placed(variables, mesh, replicated), *_placed(inputs, mesh, spec))
    return Program(step, arguments, mesh, images.size * dtype.itemsize / target.devices)


def build_layer(case: Case, axis: str | None) -> tuple[Layer, Variables]:
    """Return the layer of a case with what follows it, and the shapes of its variables."""
    activation = nn.relu if case.epilogue == "ReLU" else None
    if case.contender == cases.NONE:
        return lambda variables, x: (x if activation is None else activation(x), {}), {}
    common = {"use_running_average": False, "dtype": jnp.dtype(case.dtype), "axis_name": axis}
    if case.ours:
        module, after = jaxbn.linen.BatchNorm(**common, activation=activation), None
    else:
        module, after = nn.BatchNorm(**common, use_fast_variance=case.contender != cases.STABLE), activation

    def layer(variables: Variables, x: jax.Array) -> tuple[jax.Array, Variables]:
        y, new = module.apply(variables, x, mutable=["batch_stats"])
        return (y if after is None else after(y)), dict(new)

    x = jax.ShapeDtypeStruct((2, CHANNELS), common["dtype"])
    # Where there are no devices to share statistics with yet, the axis has no meaning.
    return layer, jax.eval_shape(module.clone(axis_name=None).init, jax.random.key(0), x)


def differentiate(layer: Layer) -> Callable[..., Any]:
    """Return the layer's step: output, new statistics, and the derivatives of parameters and x given that of y."""

    def step(variables: Variables, x: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        def f(params: Variables, x: jax.Array) -> tuple[jax.Array, Variables]:
            return layer({**variables, "params": params}, x)

        y, vjp, new = jax.vjp(f, variables["params"], x, has_aux=True)
        return y, new, *vjp(dy)

    return step


def train_net(layer: Layer, axis: str | None) -> Callable[..., Any]:
    """Return the step of gradient descent of the net of convolutions."""

    def loss(params: list[Any], stats: list[Any], x: jax.Array) -> tuple[jax.Array, list[Any]]:
        news = []
        for (kernel, own), old in zip(params, stats, strict=True):
            x = jax.lax.conv_general_dilated(
                x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, new = layer({**own, **old}, x)
            news.append(new)
        value = jnp.mean(jnp.mean(x, (1, 2)).astype(jnp.float32) ** 2)
        return (value if axis is None else jax.lax.pmean(value, axis)), news

    def step(variables: list[Any], x: jax.Array) -> tuple[Any, ...]:
        params = [(kernel, {k: v for k, v in own.items() if k == "params"}) for kernel, own in variables]
        stats = [{k: v for k, v in own.items() if k == "batch_stats"} for _, own in variables]
        (value, news), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, x)
        return _descend(params, gradient), news, value

    return step


def train_model(model: nn.Module) -> Callable[..., Any]:
    """Return the step of gradient descent of a classifier."""

    def step(variables: Variables, images: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
        def loss(params: Variables) -> tuple[jax.Array, Any]:
            y, new = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
            assert isinstance(y, jax.Array)
            return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, CLASSES) * nn.log_softmax(y), -1)), new

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return _descend(variables["params"], gradient), new, value

    return step


def _swapped(x: jax.Array, residual: jax.Array | None, relu: bool, inside: bool = False) -> jax.Array:
    inside = inside and relu and residual is None
    layer = jaxbn.linen.BatchNorm(use_running_average=False, dtype=x.dtype, activation=nn.relu if inside else None)
    y = layer(x)
    y = y if residual is None else y + residual
    return nn.relu(y) if relu and not inside else y


NORMS: dict[str, networks.Norm] = {
    cases.SWAPPED: _swapped,
    cases.INSIDE: lambda x, residual, relu: _swapped(x, residual, relu, inside=True),
    cases.FLAX: networks.theirs,
}


def _descend(params: Any, gradient: Any) -> Any:
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def _placed(shapes: Any, mesh: jax.sharding.Mesh, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), shapes)
