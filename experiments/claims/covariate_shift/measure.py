"""Claim 2: internal covariate shift by both of its definitions, and batch norm with noise that restores it."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.claims._lib.networks import noisy
from experiments.claims._lib.search import widened
from experiments.claims._lib.study import Study, Trained, chosen, tested
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.data import Data, Split, batches
from experiments.training.layers import Layer, Pass
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Carry, loss_of

PROBE, QUANTILES = 512, (0.15, 0.5, 0.85)
DEEP, WIDE, SAMPLES, PAPERS_RATE = 25, 10, 256, 1e-6  # Santurkar et al. 2018: the linear network


def same(v: jax.Array) -> jax.Array:
    """No activation."""
    return v


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure drift of quantiles, change of gradients, and accuracy with and without noise, of each seed."""
    s = study.settings(given)
    relu = {"widths": (64,) * 5, "activation": "relu", "init": "he", "init_scale": 1.0, "log_every": 50, "steps": 1000}
    r = study.settings(given, **relu, learning_rates=(0.03, 0.1, 0.3, 1.0))
    rates = (PAPERS_RATE, 1e-3, 1e-2, 1e-1)
    deep = 4 if study.smoke else DEEP
    linear = {"widths": (WIDE,) * (deep - 1), "log_every": 100, "steps": 1000, "batch_size": SAMPLES}
    d = study.settings(given, **linear, learning_rates=rates)
    # Both arms get the grid on which the best of each is interior. A smoke run searches nothing.
    arms = ("batch",) if study.smoke else ("none", "batch")
    for_drift = widened(study, "shift-rate-drift", s, arms, partial(_sigmoid_model, study), asked={})["grid"]
    for_relu = widened(study, "shift-rate-relu", r, arms, partial(_relu_model, study), asked={})["grid"]
    s, r = (dataclasses.replace(v, learning_rates=tuple(g)) for v, g in ((s, for_drift), (r, for_relu)))
    found: dict[str, Any] = {
        "rates": for_drift,
        "steps": s.steps,
        "relu_rates": for_relu,
        "linear_rates": d.learning_rates,
    }
    for arm in ("none", "batch"):
        found[f"drift_{arm}"] = study.part(
            f"shift-drift-{arm}", {"settings": s, "arm": arm}, partial(drift, study, s, arm)
        )
        found[f"linear_{arm}"] = study.part(
            f"shift-linear-{arm}", {"settings": d, "arm": arm}, partial(linear_network, study, d, arm)
        )
    for arm in ("none", "batch", "noisy", "noise"):
        # In a smoke run the arm with all parts stands for those with fewer.
        own = {"none": "batch", "noise": "noisy"}.get(arm, arm) if study.smoke else arm
        found[f"relu_{arm}"] = study.part(
            f"shift-relu-{own}", {"settings": r, "arm": own}, partial(relu_network, study, r, own)
        )
    return found


def _sigmoid_model(study: Study, s: Settings, arm: str) -> Model:
    return mlp([layers.of(s, arm)] * len(s.widths), s.widths, gaussian(s.init_scale, he=False), study.pixels)


def _relu_model(study: Study, s: Settings, arm: str) -> Model:
    """Return five layers of ReLU: plain, with batch norm, and both followed by noise."""
    makers: dict[str, Callable[[], Layer]] = {
        "none": lambda: layers.plain(jax.nn.relu),
        "batch": lambda: layers.batch_norm(momentum=s.bn_momentum, activation=jax.nn.relu),
        "noisy": lambda: noisy(layers.batch_norm(momentum=s.bn_momentum), jax.nn.relu),
        "noise": lambda: noisy(layers.plain(same), jax.nn.relu),
    }
    return mlp([makers[arm]()] * len(s.widths), s.widths, gaussian(1.0, he=True), study.pixels)


def drift(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """Return the mean change between two observations of three quantiles of every unit of the last hidden layer."""
    model = _sigmoid_model(study, s, arm)
    probe = jnp.asarray(study.data.train.images[:PROBE])

    def of_run(carry: Carry) -> tuple[jax.Array, jax.Array]:
        assert model.hidden is not None
        entering, _ = model.hidden(carry.params, carry.state, probe, Pass(train=True))[-1]
        shift = carry.params["shifts"][-1]
        if arm == "none":
            inputs = normal = entering + shift[None]
        else:
            inputs, _ = jaxbn.bn_apply(shift, carry.state[-1], entering, True)
            normal, _ = jaxbn.bn_apply(*jaxbn.bn_init(entering.shape[1]), entering, True)
        return jnp.quantile(inputs, jnp.array(QUANTILES), axis=0), jnp.quantile(normal, jnp.array(QUANTILES), axis=0)

    quantiles, seen = jax.jit(jax.vmap(jax.vmap(of_run))), []

    def watch(step: int, carry: Carry) -> None:
        seen.append(jax.device_get(quantiles(carry)))

    trained = study.fit(s, model, watch=watch, test=False)
    found: dict[str, Any] = {"best": int(chosen(trained.log))}
    for at, name in enumerate(("inputs", "normalized")):
        q = np.stack([observed[at] for observed in seen])  # [observed, seeds, rates, 3, units]
        moved, width = np.abs(np.diff(q, axis=0)).sum(3), (q[:-1, :, :, 2] - q[:-1, :, :, 0])
        found[name] = moved.mean((0, 3))
        # A unit that gives the same for every image has no distribution to speak of.
        found[f"{name}_scaled"] = (moved / np.maximum(width, 1e-6)).mean((0, 3))
        found[f"{name}_unit"] = q[:: max(1, len(q) // 60), 0, :, :, 0]  # of one unit of the first seed, for the figure
    return found


def alignment(model: Model, optimizer_rate: Any, params: Any, state: Any, images: Any, labels: Any) -> jax.Array:
    """`[3, layers]`: for each layer but the first the cosine between its gradient before and after the layers in front
    of it have made their step of gradient descent, and the length of the change, relative and absolute."""
    depth = len(params["kernels"])

    def gradient(p: Any) -> Any:
        return jax.grad(lambda p: loss_of(model.apply(p, state, images, True, None)[0], labels))(p)

    before = gradient(params)
    moved = jax.tree.map(lambda p, g: p - optimizer_rate * g, params, before)

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


def watched(study: Study, s: Settings, model: Model, data: Data, *, test: bool) -> tuple[Trained, np.ndarray]:
    """Return a training, and `alignment` before it and after each chunk, `[observed, seeds, rates, 3, layers]`."""
    rates, seeds = jnp.asarray(s.learning_rates, jnp.float32), jnp.arange(s.seeds, dtype=jnp.int32)
    sizes = {"steps": 1, "batch_size": s.batch_size, "examples": len(data.train.labels)}
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)

    def of_seed(seed: Any, carry: Carry, step: Any) -> jax.Array:
        (rows,) = batches(seed, step, **sizes)
        one = partial(alignment, model, images=images[rows], labels=labels[rows])
        return jax.vmap(lambda rate, p, state: one(rate, p, state))(rates, carry.params, carry.state)

    observe, seen = jax.jit(jax.vmap(of_seed, (0, 0, None))), []

    def watch(step: int, carry: Carry) -> None:
        seen.append(jax.device_get(observe(seeds, carry, jnp.asarray(step, jnp.int32))))

    trained = study.fit(s, model, data=data, watch=watch, test=test)
    return trained, np.stack(seen)


def summed(trained: Trained, seen: np.ndarray) -> dict[str, Any]:
    """Return means over steps and layers, of each seed at each rate; what diverged has no gradient to compare."""
    finite = np.isfinite(np.sum(seen, (3, 4)))  # [observed, seeds, rates]
    kept = np.where(finite[..., None, None], seen, np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # a rate at which all seeds diverged at once: NaN
        mean, by_step = np.nanmean(kept, (0, 4)), np.nanmean(kept[:, :, :, 0], 3)
    return {
        "best": int(chosen(trained.log)),
        "cosine": mean[..., 0],
        "relative": mean[..., 1],
        "absolute": mean[..., 2],
        "by_step": by_step,
        "steps": [0, *trained.log.steps],
        "loss": trained.log.train_loss.mean(0),
        "val_accuracy": trained.log.val_accuracy[..., -1],
    }


def linear_network(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """Train 25 linear layers on a linear map of 10 Gaussian inputs, all samples in each step."""
    nothing = Layer(lambda features: (jnp.zeros(0), None), lambda params, state, x, run: (x, state))
    between = [nothing if arm == "none" else layers.batch_norm()] * len(s.widths)
    model = mlp(between, s.widths, gaussian(WIDE**-0.5, he=False), WIDE, WIDE)  # Glorot's, for square matrices
    rng = np.random.default_rng(0)
    to = rng.standard_normal((WIDE, WIDE))

    def drawn() -> Split:
        x = rng.standard_normal((SAMPLES, WIDE))
        return Split(x.astype(np.float32), (x @ to).astype(np.float32))

    return summed(*watched(study, s, model, Data(drawn(), drawn(), drawn()), test=False))


def relu_network(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """Train a ReLU network, and watch the gradients of the two without noise."""
    model = _relu_model(study, s, arm)
    if arm in ("none", "batch"):
        trained, seen = watched(study, s, model, study.data, test=True)
        found = summed(trained, seen)
    else:
        trained, found = study.fit(s, model), {}
    best = int(chosen(trained.log))
    curve = trained.log.val_accuracy[:, best]
    return found | {"best": best, "test": tested(trained.log, best), "steps": trained.log.steps, "val_curve": curve}
