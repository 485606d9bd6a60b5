"""Claim 6: training from weights of the wrong scale, from equal weights, and the scaling that changes nothing."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims._lib.search import at_best, kept, results, search, widened
from experiments.claims._lib.study import QUICK, Study
from experiments.training import layers
from experiments.training.config import Settings
from experiments.training.models import Model, gaussian, mlp
from experiments.training.train import Arm, Carry, compile_arm

SCALES = (1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 100.0)
STARTS = tuple(f"{scale:g}" for scale in SCALES)
ARMS, ALIKE = ("none", "batch"), ("zero", "equal")
EPSILON, SMALL_EPSILON = 1e-5, 1e-12
EXACT, EXACT_STEPS, EXACT_RATE = (0.1, 10.0), 30, 0.1


def measure(study: Study, given: Settings) -> dict[str, Any]:
    """Measure accuracies `[seeds, rates]` from each start, and how far a training that should be the same is from it.

    The rate that is best from He's weights is kept for all starts under `rate`, and `runs` have all rates, from the
    grid of He's weights on. `last` are trainings at that rate whose last layer is scaled too.
    """
    s, make = study.settings(given), cache(partial(_arm, study))
    he = search(study, "initialization-1", s, ARMS, make, asked={"from": "1"})
    s = dataclasses.replace(s, learning_rates=tuple(he["grid"]), steps=he["steps"])
    found: dict[str, Any] = {
        "scales": SCALES,
        "steps": he["steps"],
        "moved": he["moved"],
        "runs": {"1": kept(he, ARMS)},
    }
    for start in study.few(STARTS):
        if start != "1":
            name, begin = f"initialization-{start}", partial(_begin, start, False)
            run = widened(study, name, s, ARMS, make, asked={"from": start}, start=begin)
            found["runs"][start] = kept(run, ARMS)
    found["rate"] = {arm: he["grid"][at_best(he[arm])[0]] for arm in ARMS}
    found["last"] = {arm: {} for arm in ARMS}
    for arm in ARMS:
        one = dataclasses.replace(s, learning_rates=(found["rate"][arm],))
        for start in ("1", *study.few(STARTS)):
            begin, asked = partial(_begin, start, True), {"from": start, "last": True}
            found["last"][arm][start] = _one(study, f"initialization-last-{start}", one, arm, make, asked, begin)
    one = dataclasses.replace(s, learning_rates=(found["rate"]["batch"],))
    for name, arm, start in (("small_epsilon", "small_epsilon", STARTS[0]), *((v, "batch", v) for v in ALIKE)):
        begin = partial(_begin, start, False)
        found[name] = _one(study, f"initialization-{name}", one, arm, make, {"from": start}, begin)
    e = study.settings(given, learning_rates=(EXACT_RATE,), steps=EXACT_STEPS, log_every=EXACT_STEPS)
    e = dataclasses.replace(e, steps=e.log_every)
    found["same_training"] = study.part("initialization-exact", {"settings": e}, lambda: _same_training(study, e))
    return found


def _one(study: Study, name: str, s: Settings, arm: str, make: Any, asked: dict[str, Any], start: Any) -> np.ndarray:
    """Train one arm at one rate, which is no grid to widen; return the training accuracy of each seed."""
    asked = {"settings": s, "arm": arm, **asked}
    run = study.part(f"{name}-{arm}", asked, lambda: results(study, s, lambda one: make(one, arm), start=start))
    return np.asarray(run["train"])[:, 0]


def _arm(study: Study, s: Settings, arm: str) -> Arm:
    """Compile an arm, once for all starts."""
    model = _model(study, s, SMALL_EPSILON if arm == "small_epsilon" else EPSILON, arm)
    return compile_arm(s, model, None, QUICK)


def _model(study: Study, s: Settings, epsilon: float, arm: str = "batch") -> Model:
    act = layers.ACTIVATIONS[s.activation]
    norm = layers.batch_norm(momentum=s.bn_momentum, activation=act, epsilon=epsilon)
    layer = layers.plain(act) if arm == "none" else norm
    return mlp([layer] * len(s.widths), s.widths, gaussian(1.0, he=True), study.data.pixels)


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

        done = study.fit(s, _model(study, s, EPSILON * a**2), optimizer=optimizer, start=start)
        return [np.asarray(k, np.float64)[:, 0] / a for k in done.carry.params["kernels"][:-1]]

    plain = trained(1.0)
    found = {}
    for a in EXACT[:1] if study.smoke else EXACT:
        apart = [np.abs(k - p).max((1, 2)) / np.abs(p).max((1, 2)) for k, p in zip(trained(a), plain, strict=True)]
        found[f"{a:g}"] = np.max(apart, axis=0)
    return found
