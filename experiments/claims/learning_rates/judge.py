"""Claim 5: the estimates and the figure."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, at_edge, best, geometric, mean, tuned
from experiments.claims._lib.verdict import Estimates

LEARNED, TESTED = 0.95, 0.9  # training and test accuracy
LEAST = 1e-6  # stands for no rate
DEPTHS = (2, 5, 10, 20)
NAMES = {"batch": "batch norm", "none": "no norm"}
Part = dict[str, Any]


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    # A smoke run leaves networks out: any will do in their place.
    part = {name: found.get(name, found["depth_10"]) for name in ("small", *map(_name, DEPTHS))}
    main, small = part["depth_10"], part["small"]
    scores, tests, trains = ([main[arm][kind] for arm in NAMES] for kind in ("validation", "test", "train"))
    edge = at_edge(main["rates"], **{arm: main["rates"][best(s)] for arm, s in zip(NAMES, scores, strict=True)})
    return {
        "learns": _ratio(main, learned),
        "strong": _ratio(main, learned),
        "learns_test": _ratio(main, tests_well),
        "finite": _ratio(main, stays_finite),
        **{_name(depth): _ratio(part[_name(depth)], learned) for depth in DEPTHS if depth != 10},
        "learns_small": _ratio(small, learned),
        "best": _best(main),
        "best_small": _best(small),
        "above_max": _above(main),
        "above_max_small": _above(small),
        "batch_over_plain": tuned(scores, tests, lambda a, b: 100 * (a - b), "pp").with_caveat(edge),
        "batch_over_plain_train": tuned(scores, trains, lambda a, b: 100 * (a - b), "pp").with_caveat(edge),
        "finite_batch": mean(100 * np.mean(stays_finite(main, "batch"), 1), "%"),
        "moved_10": _moved(main),
        "moved_20": _moved(part["depth_20"]),
    }


def learned(part: Part, arm: str) -> np.ndarray:
    """Return whether a run knows its training images, `[seeds, rates]`."""
    return stays_finite(part, arm) & (np.asarray(part[arm]["train"], float) >= LEARNED)


def tests_well(part: Part, arm: str) -> np.ndarray:
    """Return whether a run classifies the test images, `[seeds, rates]`."""
    return stays_finite(part, arm) & (np.asarray(part[arm]["test"], float) >= TESTED)


def stays_finite(part: Part, arm: str) -> np.ndarray:
    """Return whether the loss of a run is finite, `[seeds, rates]`."""
    return np.asarray(part[arm]["finite"], bool)


def largest(part: Part, arm: str, works: Callable[[Part, str], np.ndarray]) -> np.ndarray:
    """Return the largest rate that works for each seed, or 0."""
    return np.max(np.where(works(part, arm), np.asarray(part["rates"], float), 0.0), -1)


def _ratio(part: Part, works: Callable[[Part, str], np.ndarray]) -> Estimate:
    """Return the ratio of the largest rates, seed by seed; infinite where the plain network has none, 1 where none."""
    rates = {name: largest(part, arm, works) for arm, name in NAMES.items()}
    batch, none = rates.values()
    with np.errstate(divide="ignore", invalid="ignore"):
        made = geometric(np.where((batch == 0) & (none == 0), 1.0, batch / none))
    at_end = [name for name, of_seeds in rates.items() if np.any(of_seeds == max(part["rates"]))]
    never = [name for name, of_seeds in rates.items() if not np.any(of_seeds)]
    caveat = f"the largest rate on offer still works: {at_end[0]}" if at_end else ""
    return made.with_caveat(f"no rate on offer works: {never[0]}" if never else caveat)


def _best(part: Part) -> Estimate:
    """Return the ratio of the best rates by validation, chosen again in each resample."""
    scores = [np.asarray(part[arm]["validation"], float) for arm in NAMES]
    rates = [np.broadcast_to(np.asarray(part["rates"], float), v.shape) for v in scores]
    return tuned(scores, rates, np.divide, log=True)


def _above(part: Part) -> Estimate:
    """Return the gain of the network with batch norm from rates above the plain network's largest."""
    limit, rates = np.max(largest(part, "none", learned)), np.asarray(part["rates"])

    def at_best(side: np.ndarray) -> np.ndarray:
        side = side if side.any() else ~side
        at = int(np.argmax(np.where(side, np.mean(part["batch"]["validation"], 0), -math.inf)))
        return np.asarray(part["batch"]["test"], float)[:, at]

    return mean(100 * (at_best(rates > limit) - at_best(rates <= limit)), "pp")


def _moved(part: Part) -> Estimate:
    """Return the plain network's largest rate after all steps over that after half of them."""
    halves = [
        np.max(np.where(np.asarray(part["none"][what], float) >= LEARNED, part["rates"], LEAST), -1)
        for what in ("train", "train_half")
    ]
    return geometric(halves[0] / halves[1])


def _name(depth: int) -> str:
    return f"depth_{depth}"


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw training accuracy against the rate, the ratio of the largest rates against depth, and test accuracy."""
    left, middle, right = figure.subplots(1, 3)
    main, small, made = found["depth_10"], found.get("small", found["depth_10"]), estimates(found)
    for arm, name in NAMES.items():
        plots.band(left, main["rates"], 100 * np.asarray(main[arm]["train"], float), arm, name)
        plots.band(right, small["rates"], 100 * np.asarray(small[arm]["test"], float), arm, name)
    left.axhline(100 * LEARNED, color="black", lw=0.8, ls=":")
    plots.finish(left, "learning rate", "training accuracy, %", "10 layers", "lower left", xscale="log", ylim=(0, 103))
    title = "10 layers, batches of 16"
    plots.finish(right, "learning rate", "test accuracy, %", title, "lower left", xscale="log", ylim=(0, 103))
    keys = {depth: "learns" if depth == 10 else _name(depth) for depth in DEPTHS if _name(depth) in found}
    known = {depth: e for depth, key in keys.items() if (e := made[key]) and math.isfinite(e.value)}
    at = np.array([[e.value, e.value - e.low, min(e.high, 1e6) - e.value] for e in known.values()]).reshape(-1, 3).T
    middle.errorbar(list(known), at[0], at[1:], **plots.style("batch") | {"capsize": 3})
    middle.axhline(2, color="black", lw=0.8, ls=":")
    # A smoke run learns at no rate, and a logarithmic axis needs numbers.
    scale = {"xscale": "log", "yscale": "log"} if np.all(at[0] > at[1]) and known else {}
    plots.finish(middle, "hidden layers", "largest rate, batch norm over no norm", "ratio, 95% interval", **scale)
    middle.set_xticks(list(known), [str(depth) for depth in known])
    middle.minorticks_off()
    shown = ", ".join(f"{e.value:.3g} at {depth}" for depth, e in known.items())
    n, limits = len(main["none"]["finite"]), [float(np.median(largest(main, arm, learned))) for arm in NAMES]
    alt = (
        f"Training accuracy by learning rate, at {LEARNED:.0%} up to a rate of {limits[0]:.2g} with batch norm and "
        f"{limits[1]:.2g} without; the ratio of these rates by depth; test accuracy by rate in small batches."
    )
    return alt, (
        f"Largest rate that learns, batch norm over no norm, by layers: {shown} (middle). Left and right: "
        f"medians and quartiles, n = {n} splits. Dotted: criteria. Bjorck's rates are the normal ones at 110 layers, "
        "ours the largest."
    )
