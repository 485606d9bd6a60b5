"""Claim 1: means, variances and correlations of hidden units, after batch norm and after whitening."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.claims._lib.study import Study
from experiments.training import layers, networks
from experiments.training.config import Settings
from experiments.training.data import Data, Split
from experiments.training.layers import ACTIVATIONS, Pass
from experiments.training.models import Model, mlp
from experiments.training.train import Carry, compile_arm, loss_of

ROWS, ITERATIONS, EPSILON = 1024, 10, 1e-5
UNITS = 32  # whose correlations are drawn in the figure


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure a network with batch norm and one with whitening, before, early in and after training."""
    s = study.varied(study.settings(given))
    constants = {"rows": ROWS, "iterations": ITERATIONS, "epsilon": EPSILON, "units": UNITS}
    found = {
        arm: study.part(f"normalizes-{arm}", {"settings": s, "arm": arm, **constants}, partial(_watched, study, s, arm))
        for arm in ("batch", "whiten")
    }
    return found | {"steps": [0, s.log_every, s.steps], "rates": s.learning_rates}


def _watched(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """Return the numbers of all probes `[seeds, probes, rates, layers]`, and of the first seed what is drawn."""
    activation, momentum = ACTIVATIONS[s.activation], s.bn_momentum
    if arm == "whiten":
        layer = layers.whitening(s.whiten_size, activation, iterations=ITERATIONS, momentum=momentum, epsilon=EPSILON)
    else:
        layer = layers.batch_norm(activation=activation, momentum=momentum, epsilon=EPSILON)
    model = mlp([layer] * len(s.widths), s.widths, networks.weights(s), study.data.pixels)
    one = dataclasses.replace(s, seeds=1)
    trained, rows = compile_arm(one, model), min(ROWS, len(study.data.train.labels))
    looks = {
        n: jax.jit(
            jax.vmap(partial(_look, model, s.whiten_size, (arm, *(("whiten",) if n == rows else ()))), (0, 0, None))
        )
        for n in (rows, s.batch_size)
    }
    seeds: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    for seed in range(s.seeds):
        data, probes = study.on(seed).data, []

        def watch(step: int, carry: Carry, data: Data = data, probes: list[Any] = probes) -> None:
            if step in (0, s.log_every, s.steps):
                params, state = jax.tree.map(lambda v: v[0], (carry.params, carry.state))
                large, small = (jax.device_get(look(params, state, data.train.images[:n])) for n, look in looks.items())
                probes.append(_numbers(large, small, arm, s.whiten_size))
                if arm == "batch" and step == s.steps and not drawn:
                    batch = Split(*(v[: s.batch_size] for v in data.train))
                    drawn.update(_drawn(large) | {"through": _through(s, model, params, state, batch)})

        study.fit(one, trained, data=data, first_seed=seed, watch=watch, test=False)
        seeds.append({name: np.stack([p[name] for p in probes]) for name in probes[0]})
    return {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]} | drawn


def _through(s: Settings, model: Model, params: Any, state: Any, batch: Split) -> jax.Array:
    """Return how much of a gradient passes through the statistics, as a share of it without, at each rate.

    Without: mean and variance are constants to the gradient, as those of a pre-processing step would be.
    """

    def stopped(given: Any, state: Any, x: jax.Array, run: Pass) -> tuple[jax.Array, Any]:
        m = jax.lax.stop_gradient(jaxbn.moments(x))
        normal = (x - m.mean[None]) * jax.lax.rsqrt(m.var + EPSILON)[None]
        return ACTIVATIONS[s.activation](normal * given.scale[None] + given.bias[None]), state

    other = mlp([layers.Layer(jaxbn.bn_init, stopped)] * len(s.widths), s.widths, networks.weights(s))

    def share(params: Any, state: Any) -> jax.Array:
        def loss(kernels: Any, network: Model) -> jax.Array:
            return loss_of(
                network.apply(params | {"kernels": kernels}, state, batch.images, True, None)[0], batch.labels
            )

        whole, without = (jax.grad(loss)(params["kernels"], network)[:-1] for network in (model, other))
        apart = sum(jnp.sum((a - b) ** 2) for a, b in zip(whole, without, strict=True))
        return jnp.sqrt(apart / sum(jnp.sum(b**2) for b in without))

    return jax.jit(jax.vmap(share))(params, state)


def _look(
    model: Model, size: int, norms: tuple[str, ...], params: Any, state: Any, images: Any
) -> list[dict[str, jax.Array]]:
    """Return for each hidden layer its input, that after `norms` without scale and bias, and the next layer's input."""
    assert model.hidden is not None
    seen = []
    for entering, leaving in model.hidden(params, state, jnp.asarray(images), Pass(True)):
        features = entering.shape[-1]
        made = {"entering": entering, "leaving": leaving}
        if "batch" in norms:
            made["batch"], _ = jaxbn.bn_apply(*jaxbn.bn_init(features), entering, True, epsilon=EPSILON)
        if "whiten" in norms:
            start = jaxbn.whitening.whiten_init(features, group_size=size)
            made["whiten"], _ = jaxbn.whitening.whiten_apply(
                *start, entering, True, iterations=ITERATIONS, epsilon=EPSILON
            )
        seen.append(made)
    return seen


def _numbers(
    large: list[dict[str, np.ndarray]], small: list[dict[str, np.ndarray]], arm: str, size: int
) -> dict[str, Any]:
    """Return the numbers of one probe, each `[rates, layers]`."""

    def each(number: Any) -> np.ndarray:
        return np.stack([number(layer) for layer in large], -1)

    off = [[deviations(s["entering"], s[arm]) for s in seen] for seen in (large, small)]
    worst = np.max(off, axis=0)  # of both batches: [layers, 2, rates]
    return {
        "mean": worst[:, 0].T,
        "var": worst[:, 1].T,
        "before": each(lambda v: pairs(v["entering"])),
        "all": each(lambda v: pairs(v[arm])),
        "within": each(lambda v: pairs(v[arm], size)),
        "same_whitened": each(lambda v: pairs(v["whiten"], size)),
        "next_mean": each(lambda v: np.median(v["leaving"].mean(1, dtype=np.float64), -1)),
        "next_var": each(lambda v: np.median(v["leaving"].var(1, dtype=np.float64), -1)),
    }


def _drawn(large: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return of the first rate what the figure draws: correlations in the layer in the middle, and all units."""
    return {
        "matrix": np.round(correlations(large[len(large) // 2]["batch"][0])[:UNITS, :UNITS], 3),
        "units": {
            name: [
                np.round(np.concatenate([moment(v[name][0], 0, dtype=np.float64) for v in large]), 3)
                for moment in (np.mean, np.std)
            ]
            for name in ("entering", "batch", "leaving")
        },
    }


def deviations(x: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return how far units of `normal [seeds, rows, units]`, made of `x`, are off mean 0 and v / (v + epsilon)."""
    v = x.var(1, dtype=np.float64)
    mean, var = normal.mean(1, dtype=np.float64), normal.var(1, dtype=np.float64)
    return np.stack([np.abs(mean).max(-1), np.abs(var - v / (v + EPSILON)).max(-1)])


def correlations(x: np.ndarray) -> np.ndarray:
    """Return the correlations between the units of `x [..., rows, units]`; 0 with a unit that does not vary."""
    d = x.astype(np.float64)
    d = d - d.mean(-2, keepdims=True)
    d = d / np.maximum(np.sqrt(np.sum(d * d, -2, keepdims=True)), 1e-30)
    return np.swapaxes(d, -1, -2) @ d


def pairs(x: np.ndarray, size: int | None = None) -> np.ndarray:
    """Return the mean |correlation| of two units of `x [..., rows, units]`, of the same group of `size` if given."""
    group = np.arange(x.shape[-1]) // (size or x.shape[-1])
    counted = (group[:, None] == group[None]) & ~np.eye(x.shape[-1], dtype=bool)
    return np.abs(correlations(x))[..., counted].mean(-1)
