"""Claim 11: the same training with norms over ever fewer images; the batch that the gradient is taken of stays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxbn
from experiments.claims._lib.networks import conv, group_norm
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import ACTIVATIONS, Layer, Pass
from experiments.training.models import Model, mlp
from experiments.training.shapes import Tree
from experiments.training.train import Carry, accuracy_of

SIZES = {"batch": (2, 4, 8, 16, 32, 64), "renorm": (2, 4, 32), "moving": (2, 4, 32)}
EXAMPLEWISE = {"group": 4, "layer": 1}  # groups of channels; these norms know no batch
CHANNELS = (16, 32)
EPSILON = 1e-5
WARM = 0.2  # the share of training before batch renormalization is at its limits, and before MABN corrects
KEEP = 15 / 16  # of MABN's averages: some sixteen batches count
MOST = 100  # batches of training images to pool, of larger data


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Test errors of each seed, in percent, by network, norm, size and kind of statistics; and what is exact."""
    s = study.settings(given)
    found: dict[str, Any] = {"exact": study.part("small_batches-exact", {"settings": s}, lambda: _exact(study, s))}
    kinds = [(arm, size) for arm, sizes in SIZES.items() for size in sizes] + [(arm, 0) for arm in EXAMPLEWISE]
    for net, example in (("cnn", ("batch", 2)), ("mlp", ("renorm", 2))):
        found[net] = {}
        for arm, size in kinds:
            # A smoke run has one training of each network, which stands for all.
            own = example if study.smoke else (arm, size)
            part = study.part(
                f"small_batches-{net}-{'-'.join(map(str, own))}",
                {"settings": s, "net": net, "arm": own},
                lambda net=net, own=own: _errors(study, s, net, *own),
            )
            found[net].setdefault(arm, {})[str(size)] = part
    return found


class Moving:
    """MABN: no mean is subtracted, and moving averages stand in for the batch in both directions.

    With s^2 the moving average of E[x^2] over a normalization batch, `z = x / s` and `y = scale r z + bias`, where r =
    s / s_running within [1/5, 5] is a constant; and `dx = (dz - z q) / s` with q the moving average of E[dz z]. Each
    part of the batch has averages of its own, as workers would that do not speak to one another; evaluation is by the
    average over all. (Yan et al. 2020, "Towards stabilizing batch statistics in backward propagation of batch
    normalization".)
    """

    def __init__(self, parts: int, momentum: float, rate: float, warm: int, activation: Callable[[Array], Array]):
        """`rate` must be that of plain SGD: it is what moves q, which only the backward pass knows."""
        self.parts, self.momentum, self.rate, self.warm, self.activation = parts, momentum, rate, warm, activation

    def layer(self) -> Layer:
        """As any other."""
        return Layer(self._init, self._apply)

    def _init(self, features: int) -> tuple[Tree, Tree]:
        own = jnp.zeros((self.parts, features))
        state = {"square": own, "running": jnp.ones(features), "count": jnp.zeros((), jnp.int32)}
        return {"affine": jaxbn.bn_init(features)[0], "q": own}, state

    def _apply(self, params: Tree, state: Tree, x: Array, run: Pass) -> tuple[Array, Tree]:
        scale, bias = params["affine"]
        if not run.train:
            wide = (1,) * (x.ndim - 1) + (-1,)
            factor = scale * jax.lax.rsqrt(state["running"] + EPSILON)
            return self.activation(x * factor.reshape(wide) + bias.reshape(wide)), state
        parts = x.reshape(self.parts, -1, x.shape[-1])
        now = jax.lax.stop_gradient(jnp.mean(parts**2, 1))
        kept = jaxbn.zero_debiased(KEEP)(state["count"])
        square = kept * state["square"] + (1 - kept) * now
        s, usual = jnp.sqrt(square + EPSILON), jnp.sqrt(state["running"] + EPSILON)
        r = jnp.where(state["count"] < self.warm, 1.0, jnp.clip(s / usual[None], 1 / 5, 5))
        z = _moved(self.rate, parts, s, params["q"])
        y = scale[None, None] * r[:, None] * z + bias[None, None]
        running = self.momentum * state["running"] + (1 - self.momentum) * jnp.mean(now, 0)
        new = {"square": square, "running": running, "count": state["count"] + 1}
        return self.activation(y.reshape(x.shape)), new


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moved(rate: float, x: Array, s: Array, q: Array) -> Array:
    """`x [parts, rows, features] / s [parts, features]`, with a derivative by the moving average q."""
    return x / s[:, None]


def _moved_forward(rate: float, x: Array, s: Array, q: Array) -> tuple[Array, Any]:
    return x / s[:, None], (x / s[:, None], s, q)


def _moved_backward(rate: float, kept: Any, dz: Array) -> tuple[Array, Array, Array]:
    z, s, q = kept
    average = KEEP * q + (1 - KEEP) * jnp.mean(dz * z, 1)
    # SGD takes rate times this from q, which leaves the average.
    return (dz - z * average[:, None]) / s[:, None], jnp.zeros_like(s), (q - average) / rate


_moved.defvjp(_moved_forward, _moved_backward)


def centred(model: Model, hidden: int) -> Model:
    """Return the same network with the mean over all inputs of a unit taken from its kernel, but in the last layer."""

    def apply(params: Tree, *given: Any, **more: Any) -> tuple[Array, Tree]:
        kernels = params["kernels"]
        kernels = [k - jnp.mean(k, 0, keepdims=True) if at < hidden else k for at, k in enumerate(kernels)]
        return model.apply(params | {"kernels": kernels}, *given, **more)

    return Model(model.init, apply)


def _network(study: Study, s: Settings, net: str, arm: str, size: int, momentum: float) -> Model:
    """Return the MLP or the CNN with the norm `arm` over `size` images."""
    activation, parts = ACTIVATIONS[s.activation], s.batch_size // max(size, 1)
    if arm in EXAMPLEWISE:
        layer = group_norm(EXAMPLEWISE[arm], activation)
    elif arm == "moving":
        layer = Moving(parts, momentum, s.learning_rates[0], int(WARM * s.steps), activation).layer()
    else:
        full = max(2, int(WARM * s.steps))
        renorm = jaxbn.renorm_warmup(s.r_max, s.d_max, start=full // 4, r_end=full, d_end=full)
        more = {"renorm": renorm} if arm == "renorm" else {}
        layer = layers.batch_norm(momentum=momentum, activation=activation, ghost_batches=parts, **more)
    widths, kernel = (s.widths if net == "mlp" else CHANNELS), networks.weights(s)
    made = (mlp if net == "mlp" else conv)([layer] * len(widths), widths, kernel, study.pixels)
    return centred(made, len(widths)) if arm == "moving" else made


def _errors(study: Study, s: Settings, net: str, arm: str, size: int) -> dict[str, Any]:
    """Test errors in percent after the last step: by running averages, pooled statistics, those of test batches."""
    model = _network(study, s, net, arm, size, s.bn_momentum)
    done = study.fit(s, model)
    found = {"running": done.log.test_accuracy[:, 0, -1], "train_loss": done.log.train_loss[:, 0, -1]}
    if arm in ("batch", "renorm"):
        still = _network(study, s, net, arm, size, 0.0)
        found |= _by_other_statistics(model, still, s.batch_size, done.carry, study.data)
    return {k: v if k == "train_loss" else 100 * (1 - np.asarray(v)) for k, v in found.items()}


def _by_other_statistics(model: Model, still: Model, size: int, carry: Carry, data: Data) -> dict[str, Any]:
    """Test accuracy by pooled statistics and by those of test batches; the state that `still` leaves is a batch's."""
    # The last test batch is filled up with the first images.
    count = len(data.test.images)
    rows = np.arange(-(-count // size) * size) % count
    train = data.train.images[: len(data.train.images) // size * size].reshape(-1, size, data.train.images.shape[1])

    def one(params: Tree, state: Tree, train: Array, tested: Array, test: Split) -> dict[str, Array]:
        def moments_of(images: Array) -> list[jaxbn.Moments]:
            new = still.apply(params, state, images, True, None)[1]
            return [jaxbn.Moments(jnp.ones_like(n.var), n.mean, n.var, jnp.zeros_like(n.var)) for n in new]

        pooled = [jaxbn.pool(m) for m in jax.lax.map(moments_of, train)]
        state_of = [jaxbn.statistics.adapt(n, m) for n, m in zip(state, pooled, strict=True)]
        by_pooled = model.apply(params, state_of, test.images, False, None)[0]
        by_batch = jax.lax.map(lambda x: model.apply(params, state, x, True, None)[0], tested)
        by_batch = by_batch.reshape(-1, by_batch.shape[-1])[:count]
        return {"precise": accuracy_of(by_pooled, test.labels), "batch": accuracy_of(by_batch, test.labels)}

    run = jax.jit(jax.vmap(one, (0, 0, None, None, None)))
    tested = data.test.images[rows].reshape(-1, size, data.test.images.shape[1])
    only = jax.tree.map(lambda v: v[:, 0], (carry.params, carry.state))
    return run(*only, jnp.asarray(train[:MOST]), jnp.asarray(tested), jax.tree.map(jnp.asarray, data.test))


def _exact(study: Study, s: Settings) -> dict[str, Any]:
    """Return the gradients that pass the first norm of the MLP before training, and group norm of parts."""
    images, width = jnp.asarray(study.data.train.images[: s.batch_size]), s.widths[0]
    group = group_norm(EXAMPLEWISE["group"], ACTIVATIONS[s.activation])

    def one(seed: Array) -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(seed), 2)
        x = images @ networks.weights(s)(keys[0], (study.pixels, width))
        dy = jax.random.normal(keys[1], x.shape)
        passed = {}
        for size in (2, s.batch_size):
            norm = layers.batch_norm(ghost_batches=s.batch_size // size)
            passed[size] = jax.vjp(lambda v, norm=norm: norm.apply(*norm.init(width), v, Pass(True))[0], x)[1](dy)[0]
        pairs = x.reshape(-1, 2, width)
        cut = jax.vmap(lambda v: group.apply(*group.init(width), v, Pass(True))[0])(pairs).reshape(x.shape)
        few, many = passed[2], passed[s.batch_size]
        return {
            "median_gradient": jnp.median(jnp.abs(few)) / jnp.median(jnp.abs(many)),
            "root_mean_square": jnp.sqrt(jnp.mean(few**2) / jnp.mean(many**2)),
            "group_change": jnp.max(jnp.abs(group.apply(*group.init(width), x, Pass(True))[0] - cut)),
        }

    return jax.jit(jax.vmap(one))(jnp.arange(s.seeds))
