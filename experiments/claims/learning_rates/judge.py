"""Claim 5: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims._lib import plots
from experiments.claims._lib.intervals import Estimate, mean, resampled, tuned
from experiments.claims._lib.verdict import Estimates

LEARNED, SHARE = 0.95, 7 / 8  # training accuracy, and the share of seeds
DEPTHS = (2, 5, 10, 20)
NAMES = {"batch": "batch norm", "none": "no norm"}


def estimates(found: dict[str, Any]) -> Estimates:
    """Return the estimates by the keys of the criteria."""
    # A smoke run leaves networks out: any will do in their place.
    part = {name: found.get(name, found["depth_10"]) for name in ("small", "head_fixed", *map(_name, DEPTHS))}
    main = part["depth_10"]
    scores, tests = ([main[arm][kind] for arm in NAMES] for kind in ("val_accuracy", "test_accuracy"))
    return {
        "learns": _ratio([main]),
        "strong": _ratio([main]),
        "finite": _ratio([main], finite=True),
        **{_name(depth): _ratio([part[_name(depth)]]) for depth in DEPTHS if depth != 10},
        "learns_small": _ratio([part["small"]]),
        "slope": _ratio([part[_name(depth)] for depth in DEPTHS]),
        "head_fixed": _ratio([part["head_fixed"]]),
        "above_max": _above(main),
        "above_max_small": _above(part["small"]),
        "batch_over_plain": tuned(scores, tests, lambda a, b: 100 * (a - b), "pp"),
    }


def largest(rates: Any, works: Any) -> Any:
    """Return the largest of `rates` that works for 7 of 8 seeds, or 0; `works` is `[..., seeds, rates]`."""
    enough = np.mean(np.asarray(works, float), -2) >= SHARE
    return np.max(np.where(enough, np.asarray(rates, float), 0.0), -1)


def quotient(above: Any, below: Any) -> Any:
    """Divide largest rates: infinite or 0 where only one of the two has any, 1 where neither has."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    known = np.where(below > 0, above / np.where(below > 0, below, 1.0), np.inf)
    return np.where((above == 0) & (below == 0), 1.0, known)


def slope(ratios: Any) -> Any:
    """Return doublings of the ratio for each doubling of the depth, by least squares over `ratios [..., depths]`."""
    x = np.log2(DEPTHS) - np.mean(np.log2(DEPTHS))
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log2(np.asarray(ratios, float))
        fitted = np.sum(x * y, -1) / np.sum(x * x)
    # Infinite in the direction of the deepest network of which only one arm learned at all.
    lost = np.isinf(y)
    last = np.take_along_axis(y, np.argmax(np.where(lost, np.arange(len(DEPTHS)), -1), -1)[..., None], -1)[..., 0]
    return np.where(lost.any(-1), last, fitted)


def works(part: dict[str, Any], arm: str, *, finite: bool = False) -> np.ndarray:
    """Return whether a run learned, or only stayed finite, `[seeds, rates]`."""
    stayed = np.asarray(part[arm]["finite"], bool)
    return stayed if finite else stayed & (np.asarray(part[arm]["train_accuracy"]) >= LEARNED)


def _ratio(parts: list[dict[str, Any]], *, finite: bool = False) -> Estimate:
    """Return the ratio of the largest rates, or its slope over several depths."""

    def statistic(drawn: np.ndarray) -> Any:
        ratios = [
            quotient(*(largest(part["rates"], works(part, arm, finite=finite)[drawn]) for arm in NAMES))
            for part in parts
        ]
        return ratios[0] if len(parts) == 1 else slope(np.stack(ratios, -1))

    made = resampled(
        statistic, len(parts[0]["none"]["finite"]), "", "of all seeds together, on a grid of factors of two"
    )
    ends = [(float(largest(p["rates"], works(p, arm, finite=finite))), p["rates"], arm) for p in parts for arm in NAMES]
    at_end = [f"{NAMES[arm]} at {rate:g}" for rate, rates, arm in ends if rate == max(rates)]
    never = [NAMES[arm] for rate, _, arm in ends if not rate]
    caveat = f"the largest rate on offer still works: {at_end[0]}" if at_end else ""
    caveat = f"no rate on offer works: {never[0]}" if never else caveat
    return made.with_caveat(caveat)


def _above(part: dict[str, Any]) -> Estimate:
    """Return the gain of the network with batch norm from rates above the plain network's largest."""
    limit, rates = float(largest(part["rates"], works(part, "none"))), np.asarray(part["rates"])

    def best(side: np.ndarray) -> np.ndarray:
        side = side if side.any() else ~side
        at = int(np.argmax(np.where(side, np.mean(part["batch"]["val_accuracy"], 0), -math.inf)))
        return np.asarray(part["batch"]["test_accuracy"])[:, at]

    return mean(100 * (best(rates > limit) - best(rates <= limit)), "pp")


def _name(depth: int) -> str:
    return f"depth_{depth}"


def draw(found: dict[str, Any], figure: Figure) -> tuple[str, str]:
    """Draw training accuracy against the rate, the largest rates against depth, and test accuracy."""
    left, middle, right = figure.subplots(1, 3)
    main, small = found["depth_10"], found.get("small", found["depth_10"])
    depths, limits = [depth for depth in DEPTHS if _name(depth) in found], {}
    for arm, name in NAMES.items():
        plots.band(left, main["rates"], 100 * np.asarray(main[arm]["train_accuracy"]), arm, name)
        plots.band(right, small["rates"], 100 * np.asarray(small[arm]["test_accuracy"]), arm, name)
        limits[arm] = [float(largest(found[_name(d)]["rates"], works(found[_name(d)], arm))) for d in depths]
        middle.plot(depths, [limit or math.nan for limit in limits[arm]], label=name, **plots.style(arm))
    left.axhline(100 * LEARNED, color="black", lw=0.8, ls=":")
    plots.finish(left, "learning rate", "training accuracy, %", "10 layers", "best", xscale="log", ylim=(0, 102))
    title = "largest learning rate that learns"
    # A smoke run learns at no rate, and a logarithmic axis needs numbers.
    scale = "log" if any(limits["batch"] + limits["none"]) else "linear"
    plots.finish(middle, "hidden layers", title, "by depth", "best", xscale="log", yscale=scale)
    plots.finish(
        right, "learning rate", "test accuracy, %", "10 layers, batches of 16", "best", xscale="log", ylim=(0, 102)
    )
    middle.set_xticks(depths, [str(d) for d in depths])
    middle.minorticks_off()
    each = zip(depths, limits["batch"], limits["none"], strict=True)
    shown = "; ".join(f"{b:.3g} and {p:.3g} at {d} layers" for d, b, p in each)
    alt = f"Accuracy against learning rate, and the largest rates that learn with batch norm and without: {shown}."
    n = len(main["none"]["finite"])
    return alt, (
        f"Left and right: median and quartiles of n = {n} seeds. Middle: the largest rate at which seven of eight "
        "seeds learn; no marker where none does."
    )
