"""Claim 2: internal covariate shift by both of its definitions, and batch norm with noise that restores it."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.claims._lib.networks import noisy
from experiments.claims._lib.search import Results, Watch, checked, kept, results
from experiments.claims._lib.study import Study, feed_each
from experiments.claims._lib.trained import Trained
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import Layer, Pass
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Carry, loss_of

PROBE, QUANTILES = 512, (0.15, 0.5, 0.85)
DEEP, WIDE, SAMPLES = 25, 10, 256  # Santurkar et al. 2018: the linear network
ALONG = (0.5, 1.0, 2.0, 4.0)  # the same: steps along the gradient, in learning rates
ARMS, NOISY = ("none", "batch"), ("none", "batch", "noisy", "noise")
RELU = {"activation": "relu", "init": "he", "init_scale": 1.0, "log_every": 100, "steps": 1000}
DRIFTS = ("inputs", "inputs_scaled", "normalized_scaled")
GRADIENTS = ("cosine", "relative", "loss_range", "unpredicted", "smoothness")


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure drift of quantiles, change of gradients, and accuracy with and without noise, by seed and rate."""
    s, relu = study.settings(given), partial(_relu_model, study)
    r = study.settings(given, **RELU, widths=(64,) * 5, learning_rates=(0.03, 0.1, 0.3, 1.0))
    n = study.settings(given, **RELU, widths=(64,) * 10, learning_rates=(0.03, 0.1, 0.3))
    # In 25 linear layers the cosines differ by seed more than by arm: five seeds decided nothing.
    deep = {"widths": (WIDE,) * (4 if study.smoke else DEEP - 1), "seeds": 24, "log_every": 200, "steps": 1000}
    d = study.varied(study.settings(given, **deep, batch_size=SAMPLES, learning_rates=(3e-4, 1e-3, 2e-3, 4e-3)))
    scores = ("validation", "test", "train")
    drift = checked(study, "shift-drift", s, ARMS, partial(_sigmoid_model, study), observe=drifts)
    found = {
        "drift": kept(drift, ARMS, (*scores, *DRIFTS)),
        "units": {arm: drift[arm]["unit"][0] for arm in ARMS},
        "relu": kept(checked(study, "shift-relu", r, ARMS, relu, observe=gradients), ARMS, (*scores, *GRADIENTS)),
        "noise": kept(checked(study, "shift-noise", n, NOISY, relu), NOISY),
        "linear": {"grid": d.learning_rates},
    }
    for arm in ARMS:
        found["linear"][arm] = study.part(
            f"shift-linear-{arm}", {"settings": d, "arm": arm}, partial(linear_network, study, d, arm)
        )
    return found


def _sigmoid_model(study: Study, s: Settings, arm: str) -> Model:
    return mlp([layers.of(s, arm)] * len(s.widths), s.widths, gaussian(s.init_scale, he=False), study.data.pixels)


def _relu_model(study: Study, s: Settings, arm: str) -> Model:
    """Return layers of ReLU: plain, with batch norm, and both followed by noise."""
    makers: dict[str, Callable[[], Layer]] = {
        "none": lambda: layers.plain(jax.nn.relu),
        "batch": lambda: layers.batch_norm(momentum=s.bn_momentum, activation=jax.nn.relu),
        "noisy": lambda: noisy(layers.batch_norm(momentum=s.bn_momentum), jax.nn.relu),
        "noise": lambda: noisy(layers.plain(lambda v: v), jax.nn.relu),
    }
    return mlp([makers[arm]()] * len(s.widths), s.widths, gaussian(1.0, he=True), study.data.pixels)


def drifts(s: Settings, model: Model, data: list[Data]) -> tuple[Watch, Callable[[Trained], Results]]:
    """Watch three quantiles of every unit of the last hidden layer; read their mean change between two observations."""
    quantiles, seen = _quantiles(model), []
    probe = jnp.stack([jnp.asarray(own.train.images[:PROBE]) for own in data])

    def watch(step: int, carry: Carry) -> None:
        seen.append(jax.device_get(quantiles(carry.params, carry.state, probe)))

    def read(done: Trained) -> Results:
        found = {}
        for at, name in enumerate(("inputs", "normalized")):
            q = np.stack([observed[at] for observed in seen])  # [observed, seeds, rates, 3, units]
            moved, width = np.abs(np.diff(q, axis=0)).sum(3), (q[:-1, :, :, 2] - q[:-1, :, :, 0])
            found[name] = moved.mean((0, 3))
            # A unit that gives the same for every image has no distribution to speak of.
            found[f"{name}_scaled"] = (moved / np.maximum(width, 1e-6)).mean((0, 3))
        q = np.stack([observed[0][..., 0] for observed in seen])
        return found | {"unit": np.moveaxis(q[:: max(1, len(q) // 30)], 0, 2)}  # of one unit, for the figure

    return watch, read


@cache
def _quantiles(model: Model) -> Any:
    """Compile the quantiles of what the last hidden layer's units get, and of the same without scale and bias."""

    def of_run(params: Any, state: Any, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert model.hidden is not None
        entering, _ = model.hidden(params, state, probe, Pass(train=True))[-1]
        shift = params["shifts"][-1]
        if state[-1] is None:
            inputs = normal = entering + shift[None]
        else:
            inputs, _ = jaxbn.bn_apply(shift, state[-1], entering, True)
            normal, _ = jaxbn.bn_apply(*jaxbn.bn_init(entering.shape[1]), entering, True)
        return jnp.quantile(inputs, jnp.array(QUANTILES), axis=0), jnp.quantile(normal, jnp.array(QUANTILES), axis=0)

    return jax.jit(jax.vmap(jax.vmap(of_run, (0, 0, None))))


def gradients(s: Settings, model: Model, data: list[Data]) -> tuple[Watch, Callable[[Trained], Results]]:
    """Watch the gradients on the batch of the next step; read means over observations and layers."""
    look, seen, one = _look(s.learning_rates, model), [], dataclasses.replace(s, log_every=1)

    def watch(step: int, carry: Carry) -> None:
        images, labels, _ = feed_each(one, step, data)
        seen.append(jax.device_get(look(carry.params, carry.state, images[:, 0], labels[:, 0])))

    def read(done: Trained) -> Results:
        each = np.stack(seen)  # [observed, seeds, rates, numbers]
        # A run that diverged has no gradient to compare.
        each = np.where(np.isfinite(each).all(-1, keepdims=True), each, np.nan)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice")
            return dict(zip(GRADIENTS, np.moveaxis(np.nanmean(each, 0), -1, 0), strict=True))

    return watch, read


@cache
def _look(rates: tuple[float, ...], model: Model) -> Any:
    """Compile the numbers of `GRADIENTS` of all runs on one batch."""

    def one(params: Any, state: Any, rate: Any, images: Any, labels: Any) -> jax.Array:
        cosine, relative, _ = alignment(model, rate, params, state, images, labels).mean(-1)
        return jnp.stack([cosine, relative, *along(model, rate, params, state, images, labels)])

    over = jax.vmap(jax.vmap(one, (0, 0, 0, None, None)), (0, 0, None, 0, 0))
    return jax.jit(lambda params, state, *batch: over(params, state, jnp.asarray(rates, jnp.float32), *batch))


def along(model: Model, rate: Any, params: Any, state: Any, images: Any, labels: Any) -> list[jax.Array]:
    """Return how loss and gradient vary along the gradient, over steps of `ALONG` times the learning rate.

    The range of the loss; the largest change of the gradient relative to it; and that change over the distance, the
    effective smoothness of Santurkar et al. 2018.
    """

    def loss(p: Any) -> jax.Array:
        return loss_of(model.apply(p, state, images, True, None)[0], labels)

    def norm(tree: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(tree)))

    here, g = jax.value_and_grad(loss)(params)
    losses, changes, slopes = [here], [], []
    for times in ALONG:
        there, h = jax.value_and_grad(loss)(jax.tree.map(lambda p, g, t=times: p - t * rate * g, params, g))
        apart = norm(jax.tree.map(jnp.subtract, h, g))
        losses.append(there)
        changes.append(apart / norm(g))
        slopes.append(apart / (times * rate * norm(g)))
    return [
        jnp.max(jnp.stack(losses)) - jnp.min(jnp.stack(losses)),
        *(jnp.max(jnp.stack(v)) for v in (changes, slopes)),
    ]


def alignment(model: Model, rate: Any, params: Any, state: Any, images: Any, labels: Any) -> jax.Array:
    """Return how a layer's gradient changes as the layers before it make their step of gradient descent.

    Of each layer but the first the cosine between the two, and the length of the change, relative and absolute,
    `[3, layers]`.
    """
    depth = len(params["kernels"])

    def gradient(p: Any) -> Any:
        return jax.grad(lambda p: loss_of(model.apply(p, state, images, True, None)[0], labels))(p)

    before = gradient(params)
    moved = jax.tree.map(lambda p, g: p - rate * g, params, before)

    def after(layer: Any) -> jax.Array:
        mixed = dict(params)
        for kind in ("kernels", "shifts"):
            mixed[kind] = [
                jax.tree.map(lambda new, old, at=at: jnp.where(at < layer, new, old), new, old)
                for at, (new, old) in enumerate(zip(moved[kind], params[kind], strict=True))
            ]
        found = []
        for g, h in zip(before["kernels"], gradient(mixed)["kernels"], strict=True):
            there, other, apart = (jnp.sqrt(jnp.sum(v**2)) for v in (g, h, h - g))
            found.append(jnp.stack([jnp.sum(g * h) / (there * other), apart / there, apart]))
        return jnp.stack(found, -1)

    which = jnp.arange(1, depth)
    every = jax.vmap(after)(which)  # [layers that moved up to, 3, layers]
    return jnp.moveaxis(every[which - 1, :, which], 0, -1)


def linear_network(study: Study, s: Settings, arm: str) -> Results:
    """Train 25 linear layers on linear maps of 10 Gaussian inputs, all samples in each step; a map for each seed."""
    empty = Layer(lambda features: (jnp.zeros(0), None), lambda params, state, x, run: (x, state))
    between = [empty if arm == "none" else layers.batch_norm()] * len(s.widths)
    model = mlp(between, s.widths, gaussian(WIDE**-0.5, he=False), WIDE, WIDE)  # Glorot's, for square matrices
    numbers = iter(range(s.seeds))

    def drawn(_: Data) -> Data:
        rng = np.random.default_rng(next(numbers))
        to = rng.standard_normal((WIDE, WIDE))
        inputs = [rng.standard_normal((SAMPLES, WIDE)) for _ in range(3)]
        train, validation, test = (Split(x.astype(np.float32), (x @ to).astype(np.float32)) for x in inputs)
        return Data(train, validation, test)

    found = results(study, s, lambda _: model, change=drawn, observe=gradients)
    return {name: found[name] for name in ("validation", *GRADIENTS)}
