"""Claim 6: training from weights of the wrong scale, from equal weights, and the scaling that changes nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.study import Study, chosen
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.data import MOST, Split
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Carry

SCALES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
EPSILON, SMALL_EPSILON = 1e-5, 1e-12
EXACT, EXACT_STEPS, EXACT_RATE = (0.1, 10.0), 30, 0.1


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Training accuracy of each seed, by scale; and how far a training that should be the same is from it."""
    s = study.settings(given)
    found: dict[str, Any] = {"scales": SCALES}
    for arm in ("none", "batch"):
        rate = study.part(f"initialization-rate-{arm}", {"settings": s, "arm": arm}, partial(_rate, study, s, arm))
        found[arm] = {"rate": rate["rate"]}
        for head in (False, True):
            # In a smoke run the one stands for the other.
            asked = {"settings": s, "arm": arm, "rate": rate["rate"], "head": head and not study.smoke}
            scaled = partial(_scaled, study, s, arm, rate["rate"], asked["head"])
            part = study.part(f"initialization-{arm}-{asked['head']}", asked, scaled)
            found[arm]["all" if head else "hidden"] = part["train_accuracy"]
    rate = found["batch"]["rate"]
    found["small_epsilon"] = study.part(
        "initialization-epsilon",
        {"settings": s, "rate": rate},
        partial(_scaled, study, s, "batch", rate, False, SMALL_EPSILON),
    )["train_accuracy"]
    e = study.settings(given, learning_rates=(EXACT_RATE,), steps=EXACT_STEPS, log_every=EXACT_STEPS)
    found["same_training"] = study.part("initialization-exact", {"settings": e}, lambda: _same_training(study, e))
    return found


def _model(study: Study, s: Settings, arm: str, epsilon: float = EPSILON) -> Model:
    act = layers.ACTIVATIONS[s.activation]
    norm = layers.batch_norm(momentum=s.bn_momentum, activation=act, epsilon=epsilon)
    return mlp([layers.plain(act) if arm == "none" else norm] * len(s.widths), s.widths, _he(), study.pixels)


def _he() -> Callable[..., Any]:
    return gaussian(1.0, he=True)


def _rate(study: Study, s: Settings, arm: str) -> dict[str, Any]:
    """The best rate from He's weights."""
    return {"rate": s.learning_rates[chosen(study.fit(s, _model(study, s, arm)).log)]}


def _scaled(study: Study, s: Settings, arm: str, rate: float, head: bool, epsilon: float = EPSILON) -> dict[str, Any]:
    """Training accuracy `[seeds, scales + 2]`; the last two from hidden weights that are zero and that are equal."""
    # A column for each start, in the place of learning rates.
    s = study.settings(s, learning_rates=(rate,) * (len(SCALES) + 2))
    count = len(s.learning_rates)
    scales = jnp.asarray((*SCALES, 0.0, 0.0)[-count:], jnp.float32)
    constant = jnp.arange(count) == count - 1

    def start(carry: Carry) -> Carry:
        *hidden, last = carry.params["kernels"]
        wide = (None, slice(None), None, None)
        started = []
        for kernel in hidden:
            equal = jnp.sqrt(2 / kernel.shape[-2])
            started.append(jnp.where(constant[wide], equal, scales[wide] * kernel))
        return carry._replace(params=carry.params | {"kernels": [*started, last * scales[wide] if head else last]})

    done = study.fit(s, _model(study, s, arm, epsilon), start=start)
    images, labels = study.data.train
    accuracy = done.arm.evaluate(done.carry, Split(images[:MOST], labels[:MOST]))[1]
    # A smoke run has the last two scales only; it repeats them.
    return {"train_accuracy": np.take(np.asarray(accuracy), np.arange(len(SCALES) + 2), axis=1, mode="wrap")}


def _same_training(study: Study, s: Settings) -> dict[str, Any]:
    """The largest distance between hidden weights that should be the same, relative to their size, of each seed."""

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
