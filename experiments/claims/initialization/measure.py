"""Claim 6: training from weights of the wrong scale, from equal weights, and the scaling that changes nothing."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims._lib.search import at_best, search, widened
from experiments.claims._lib.study import Study
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Carry

SCALES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
ARMS = ("none", "batch", "small_epsilon")
EPSILON, SMALL_EPSILON = 1e-5, 1e-12
EXACT, EXACT_STEPS, EXACT_RATE = (0.1, 10.0), 30, 0.1


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies of each seed by scale, and how far a training that should be the same is from it.

    Of each arm `hidden` and `all` are training accuracies at the rate that is best from He's weights, `..._test` test
    accuracies there, and `..._tuned` test accuracies at the rate that is best from the same start: `[seeds, starts]`.
    """
    s, make = study.settings(given), partial(_model, study)
    run = search(study, "initialization-rate", s, ARMS[:2], make, asked={})
    s = dataclasses.replace(s, learning_rates=tuple(run["grid"]), steps=run["steps"])
    found: dict[str, Any] = {"scales": SCALES, "grid": run["grid"], "steps": run["steps"], "moved": run["moved"]}
    found |= {arm: {"rate": run["grid"][at_best(run[arm])[0]]} for arm in ARMS[:2]}
    found["small_epsilon"] = {"rate": found["batch"]["rate"]}
    starts = (*(f"{scale:g}" for scale in SCALES), "zero", "equal")
    for part in ("hidden", "all"):
        runs = [
            widened(
                study,
                f"initialization-{part}-{start}",
                s,
                ARMS if part == "hidden" else ARMS[:2],
                make,
                asked={"from": start, "part": part},
                start=partial(_begin, start, part == "all"),
            )
            for start in study.few(starts)
        ]
        # A smoke run has the first and the last start only; it repeats them.
        runs = [runs[at % len(runs)] for at in range(len(starts))]
        for arm in ARMS if part == "hidden" else ARMS[:2]:
            at = [run["grid"].index(found[arm]["rate"]) for run in runs]
            for name, what in ((part, "train"), (f"{part}_test", "test")):
                found[arm][name] = np.stack([run[arm][what][:, i] for run, i in zip(runs, at, strict=True)], 1)
            found[arm][f"{part}_tuned"] = np.stack([at_best(run[arm])[1] for run in runs], 1)
    e = study.settings(given, learning_rates=(EXACT_RATE,), steps=EXACT_STEPS, log_every=EXACT_STEPS)
    found["same_training"] = study.part("initialization-exact", {"settings": e}, lambda: _same_training(study, e))
    return found


def _model(study: Study, s: Settings, arm: str, epsilon: float = EPSILON) -> Model:
    act, epsilon = layers.ACTIVATIONS[s.activation], SMALL_EPSILON if arm == "small_epsilon" else epsilon
    norm = layers.batch_norm(momentum=s.bn_momentum, activation=act, epsilon=epsilon)
    layer = layers.plain(act) if arm == "none" else norm
    return mlp([layer] * len(s.widths), s.widths, gaussian(1.0, he=True), study.pixels)


def _begin(start: str, head: bool, carry: Carry) -> Carry:
    """Scale the hidden weights, those of the last layer too if `head`; or make the hidden ones zero or all equal."""
    *hidden, last = carry.params["kernels"]
    scale = 0.0 if start in ("zero", "equal") else float(start)
    made = [jnp.full_like(k, (2 / k.shape[-2]) ** 0.5) if start == "equal" else scale * k for k in hidden]
    return carry._replace(params=carry.params | {"kernels": [*made, scale * last if head else last]})


def _same_training(study: Study, s: Settings) -> dict[str, Any]:
    """Return the largest relative distance between hidden weights that should be the same, of each seed."""

    def trained(a: float) -> list[np.ndarray]:
        def optimizer(rate: Any) -> optax.GradientTransformation:
            def update(gradients: Any, _: Any) -> Any:
                *hidden, last = gradients["kernels"]
                slow = jax.tree.map(lambda g: -rate * g, gradients | {"kernels": [last]})
                return slow | {"kernels": [-rate * a**2 * g for g in hidden] + slow["kernels"]}

            return optax.stateless(update)

        def start(carry: Carry) -> Carry:
            *hidden, last = carry.params["kernels"]
            return carry._replace(params=carry.params | {"kernels": [a * k for k in hidden] + [last]})

        done = study.fit(s, _model(study, s, "batch", EPSILON * a**2), optimizer=optimizer, start=start)
        return [np.asarray(k, np.float64)[:, 0] / a for k in done.carry.params["kernels"][:-1]]

    plain = trained(1.0)
    found = {}
    for a in EXACT[:1] if study.smoke else EXACT:
        apart = [np.abs(k - p).max((1, 2)) / np.abs(p).max((1, 2)) for k, p in zip(trained(a), plain, strict=True)]
        found[f"{a:g}"] = np.max(apart, axis=0)
    return found
