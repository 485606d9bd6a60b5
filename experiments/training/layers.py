"""The layers between two linear maps: a norm with its activation, or the activation alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxbn
from experiments.training.config import Settings
from experiments.training.shapes import Tree

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}
OWN = 0.1  # the share of an example's own statistics, where it has a say in them


class Pass(NamedTuple):
    """The conditions of one pass through a network.

    Attributes:
        train: whether it learns.
        axis_name: of the devices whose values batch statistics are made of, if they have to be named.
        key: for what is random in training.
        mask: which examples count; None if all do.
    """

    train: bool
    axis_name: str | tuple[str, ...] | None = None
    key: Array | None = None
    mask: Array | None = None

    def over(self, x: Array) -> dict[str, Any]:
        """Return the axes and the mask, as a norm of `x` takes them."""
        given: dict[str, Any] = {"axis_name": self.axis_name}
        if self.mask is not None:
            given["mask"] = jnp.reshape(self.mask, (-1,) + (1,) * (x.ndim - 1))
        return given


class Layer(NamedTuple):
    """A pair of pure functions: `init(features) -> (params, state)` and `apply(params, state, x, run) -> (y, state)`.

    `x` and `y` are `[*batch, features]`, `run` is a `Pass`; `state` is None where there is none.
    """

    init: Callable[[int], tuple[Any, Any]]
    apply: Callable[[Any, Any, jax.Array, Pass], tuple[jax.Array, Any]]


def plain(activation: Callable[[Array], Array]) -> Layer:
    """Make a bias with the activation."""

    def apply(bias: Tree, state: None, x: Array, run: Pass) -> tuple[Array, None]:
        return activation(x + jnp.reshape(bias, (1,) * (x.ndim - 1) + (-1,))), state

    return Layer(lambda features: (jnp.zeros(features), None), apply)


def batch_norm(**options: Any) -> Layer:
    """Make batch norm through the functional core, with the options of `bn_apply`.

    The activation goes inside: no memory for what lies between the two.
    """

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        return jaxbn.bn_apply(params, state, x, run.train, **run.over(x), **options)

    return Layer(jaxbn.bn_init, apply)


def group_norm(groups: int, activation: Callable[[Array], Array]) -> Layer:
    """Make group norm (Wu and He 2018): over all of an example in a group of channels; with one group layer norm."""

    def apply(params: Tree, state: None, x: Array, run: Pass) -> tuple[Array, None]:
        parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        mean, var = jnp.mean(parts, (1, 3), keepdims=True), jnp.var(parts, (1, 3), keepdims=True)
        normal = ((parts - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape)
        ones = (1,) * (x.ndim - 1)
        return activation(normal * params.scale.reshape(*ones, -1) + params.bias.reshape(*ones, -1)), state

    return Layer(lambda features: (jaxbn.bn_init(features)[0], None), apply)


def whitening(size: int, activation: Callable[[Array], Array], **options: Any) -> Layer:
    """Make a whitening of `size` features at a time, with the options of `whiten_apply`."""

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        y, state = jaxbn.whitening.whiten_apply(params, state, x, run.train, **run.over(x), **options)
        return activation(y), state

    return Layer(lambda features: jaxbn.whitening.whiten_init(features, group_size=size), apply)


def conditional(**options: Any) -> Layer:
    """Make batch norm with a scale and bias for every other row of x, the second domain."""

    def init(features: int) -> tuple[Tree, Tree]:
        return jaxbn.domains.domain_init(2, features)[0], jaxbn.bn_init(features)[1]

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        own = jax.tree.map(lambda v: v[jnp.arange(x.shape[0]) % 2], params)
        return jaxbn.bn_apply(own, state, x, run.train, **run.over(x), **options)

    return Layer(init, apply)


def domains(**options: Any) -> Layer:
    """Make batch norm with statistics, scale and bias of its own for every other row, the second domain."""

    def apply(params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        parts = []
        for domain in range(2):
            part = x[domain::2]
            y, state = jaxbn.domains.domain_apply(params, state, part, run.train, domain, **run.over(part), **options)
            parts.append(y)
        return jnp.stack(parts, 1).reshape(x.shape), state

    return Layer(lambda features: jaxbn.domains.domain_init(2, features), apply)


def of(settings: Settings, arm: str) -> Layer:
    """Make the layer of the arm that `settings` describe."""
    activation, momentum = ACTIVATIONS[settings.activation], settings.bn_momentum
    match arm:
        case "none":
            return plain(activation)
        case "group":
            return group_norm(settings.norm_groups, activation)
        case "whiten":
            return whitening(settings.whiten_size, activation, momentum=momentum)
        case "conditional":
            return conditional(momentum=momentum, activation=activation)
        case "domains":
            return domains(momentum=momentum, activation=activation)
        case _:
            return batch_norm(**options(settings, arm))


def options(settings: Settings, arm: str) -> dict[str, Any]:
    """Return the options of the norms batch, ghost and renorm, as a function or as a module; or weighed, a module.

    The last is batch in which, in evaluation, each example has a say in the statistics that normalize it.
    """
    given: dict[str, Any] = {"momentum": settings.bn_momentum, "activation": ACTIVATIONS[settings.activation]}
    if arm == "ghost":
        # The layer counts the parts of what it shares statistics over: of the whole batch, or of a part of it.
        given["ghost_batches"] = settings.ghost_batches // settings.parts
    if arm == "renorm":
        given["renorm"] = jaxbn.Renorm(settings.r_max, settings.d_max)
    if arm == "weighed":
        given["example_weight"] = OWN
    return given
