"""The networks with any of the norms, or none, as pairs of pure functions.

All arms get the same weights from the same key; a bias that batch norm would take out is left away.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.config import Settings
from experiments.shapes import Images, Logits, Tree
from jaxbn.linen import BatchNorm

CLASSES, SIDE = 10, 8
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}


class Model(NamedTuple):
    """A network: `init(key) -> (params, state)` and `apply(params, state, x, train, axis_name) -> (logits, state)`.

    `x` is `[batch, 64]`. `state` holds the running statistics; it is an empty tree where there are none.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[[Any, Any, jax.Array, bool, str | None], tuple[jax.Array, Any]]


def build(settings: Settings, arm: str) -> Model:
    """The network of `settings` with the norm `arm`."""
    return {"mlp": mlp, "cnn": cnn, "lstm": lstm}[settings.model](settings, arm)


def weights(settings: Settings) -> Callable[..., Array]:
    """An initializer of kernels `[..., inputs, outputs]`, where all axes but the last count as fan-in."""

    def init(key, shape, dtype=jnp.float32):
        he = math.sqrt(2 / math.prod(shape[:-1])) if settings.init == "he" else 1.0
        return jnp.asarray(settings.init_scale * he, dtype) * jax.random.normal(key, shape, dtype)

    return init


def options(settings: Settings, arm: str) -> dict[str, Any]:
    """What the norm `arm` is given, as a function or as a module."""
    given: dict[str, Any] = {"momentum": settings.bn_momentum, "activation": ACTIVATIONS[settings.activation]}
    if arm == "ghost":
        given["ghost_batches"] = settings.ghost_batches
    if arm == "renorm":
        given["renorm"] = jaxbn.Renorm(settings.r_max, settings.d_max)
    return given


def started(settings: Settings, arm: str, features: int) -> tuple[Any, Any]:
    """Parameters and state of a layer; without a norm its bias."""
    if arm == "none":
        return jnp.zeros(features), None
    if arm == "whiten":
        return jaxbn.whiten_init(features, group_size=settings.whiten_size)
    params, state = jaxbn.domain_init(2, features) if arm in ("domains", "conditional") else jaxbn.bn_init(features)
    return params, (jaxbn.bn_init(features)[1] if arm == "conditional" else state)


def normalized(arm: str, params: Tree, state: Tree, x: Any, train: bool, **given: Any) -> tuple[Array, Tree]:
    """The layer's output and new state; every other row of x is of the second domain."""
    if arm == "whiten":
        activation = given.pop("activation")
        y, state = jaxbn.whiten_apply(params, state, x, train, **given)
        return activation(y), state
    if arm == "conditional":
        domain = jnp.arange(x.shape[0]) % 2
        return jaxbn.bn_apply(jax.tree.map(lambda v: v[domain], params), state, x, train, **given)
    if arm != "domains":
        return jaxbn.bn_apply(params, state, x, train, **given)
    parts = []
    for domain in range(2):
        y, state = jaxbn.domain_apply(params, state, x[domain::2], train, domain, **given)
        parts.append(y)
    return jnp.stack(parts, 1).reshape(x.shape), state


def mlp(settings: Settings, arm: str) -> Model:
    """Fully connected layers; batch norm, if any, before the activation, through the functional core."""
    activation, kernel = ACTIVATIONS[settings.activation], weights(settings)
    sizes = (64, *settings.widths)

    def init(key: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, len(sizes))
        kernels = [
            kernel(k, shape) for k, shape in zip(keys, zip(sizes, (*sizes[1:], CLASSES), strict=True), strict=True)
        ]
        norms = [started(settings, arm, n) for n in sizes[1:]]
        params = {"kernels": kernels, "shifts": [p for p, _ in norms], "last": jnp.zeros(CLASSES)}
        return params, [s for _, s in norms]

    def apply(params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None) -> tuple[Logits, Tree]:
        if settings.domains == "inverted":
            x = jnp.where(jnp.arange(x.shape[0])[:, None] % 2 == 0, x, 1 - x)
        new_state = []
        for w, shift, running in zip(params["kernels"], params["shifts"], state, strict=False):
            x = x @ w
            if arm == "none":
                x = activation(x + shift[None])
            else:
                # The activation inside the layer: no memory for what lies between the two.
                given = options(settings, arm)
                x, running = normalized(arm, shift, running, x, train, axis_name=axis_name, **given)
            new_state.append(running)
        return x @ params["kernels"][-1] + params["last"][None], new_state

    return Model(init, apply)


class ConvNet(nn.Module):
    """3x3 convolutions, each with an optional norm, the activation and 2x2 pooling; then one dense layer."""

    settings: Settings
    arm: str

    @nn.compact
    def __call__(self, images: Images, train: bool, axis_name: str | None = None) -> Logits:
        """Class scores."""
        activation, kernel = ACTIVATIONS[self.settings.activation], weights(self.settings)
        x = jnp.reshape(images, (-1, 8, 8, 1))
        for channels in self.settings.widths:
            x = nn.Conv(channels, (3, 3), use_bias=self.arm == "none", kernel_init=kernel)(x)
            if self.arm == "none":
                x = activation(x)
            else:
                x = BatchNorm(not train, axis_name=axis_name, **options(self.settings, self.arm))(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, kernel_init=kernel)(x.reshape(x.shape[0], -1))


def cnn(settings: Settings, arm: str) -> Model:
    """A small convolutional network in Flax, with `jaxbn.linen.BatchNorm`."""
    net = ConvNet(settings, arm)

    def init(key: Array) -> tuple[Tree, Tree]:
        variables = net.init(key, jnp.zeros((1, 64)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None) -> tuple[Logits, Tree]:
        variables = {"params": params, "batch_stats": state}
        logits, new = net.apply(variables, x, train, axis_name, mutable=["batch_stats"] if train else [])
        return logits, new["batch_stats"] if train and state else state

    return Model(init, apply)


def lstm(settings: Settings, arm: str) -> Model:
    """One LSTM that reads the image row by row, 8 steps of 8 pixels; normalized at every step, or plain."""
    (hidden,) = settings.widths

    def init(key: Array) -> tuple[Tree, Tree]:
        own, last = jax.random.split(key)
        params, state = jaxbn.lstm_init(own, SIDE, hidden, SIDE)
        # The forget gate starts open, as LSTMs are made.
        bias = jnp.asarray(params.recurrent_norm.bias).at[hidden : 2 * hidden].set(1.0)
        params = params._replace(recurrent_norm=params.recurrent_norm._replace(bias=bias))
        head = weights(settings)(last, (hidden, CLASSES))
        return {"cell": params, "head": head, "last": jnp.zeros(CLASSES)}, state if arm == "batch" else ()

    def apply(params: Tree, state: Tree, x: Images, train: bool, axis_name: str | None) -> tuple[Logits, Tree]:
        rows = jnp.swapaxes(jnp.reshape(x, (-1, SIDE, SIDE)), 0, 1)
        carry = jaxbn.lstm_carry(params["cell"], rows.shape[1])
        if arm == "batch":
            given = {"momentum": settings.bn_momentum, "axis_name": axis_name}
            carry, _, state = jaxbn.lstm_apply(params["cell"], state, carry, rows, train, **given)
            h = carry.h
        else:
            h = plain_lstm(params["cell"], carry, rows)
        return h @ params["head"] + params["last"][None], state

    return Model(init, apply)


def plain_lstm(cell: jaxbn.LSTMParams, carry: jaxbn.LSTMCarry, rows: Array) -> Array:
    """The last output of an LSTM without norms, from the same kernels and the gates' bias."""
    bias = jnp.asarray(cell.recurrent_norm.bias)

    def step(before, x):
        c, h = before
        i, f, g, o = jnp.split(x @ cell.input_kernel + h @ cell.recurrent_kernel + bias[None], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    # As many zeros as x has devices: a loop must start on those that it goes on with.
    start = jax.tree.map(lambda v: v + 0 * jnp.sum(rows[0], -1, keepdims=True), (carry.c, carry.h))
    return jax.lax.scan(step, start, rows)[0][1]
