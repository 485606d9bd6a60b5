"""Claim 5: the estimates and the figure."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import plots
from experiments.claims.intervals import LEVEL, RESAMPLES, Estimate, mean

LEARNED, SHARE = 0.95, 7 / 8  # training accuracy, and the share of seeds
DEPTHS = (2, 5, 10, 20)


def estimates(found: dict[str, Any]) -> dict[str, Estimate]:
    """By the keys of the criteria."""
    # A smoke run leaves networks out: any will do in their place.
    part = {name: found.get(name, found["depth_10"]) for name in ("small", "head_fixed", *map(_name, DEPTHS))}
    main = part["depth_10"]
    learns = _resampled([main])
    best = [_tested(main, arm, None, above=False) for arm in ("batch", "none")]
    return {
        "learns": learns,
        "strong": learns,
        "finite": _resampled([main], finite=True),
        **{_name(depth): _resampled([part[_name(depth)]]) for depth in DEPTHS if depth != 10},
        "slope": _resampled([part[_name(depth)] for depth in DEPTHS]),
        "head_fixed": _resampled([part["head_fixed"]]),
        "above_max": _above(main),
        "above_max_small": _above(part["small"]),
        "batch_over_plain": mean(100 * (best[0] - best[1]), "pp", against=0.0),
    }


def largest(rates: Any, works: Any) -> Any:
    """The largest of `rates` that works for 7 of 8 seeds, or 0; `works` is `[..., seeds, rates]`."""
    enough = np.mean(np.asarray(works, float), -2) >= SHARE
    return np.max(np.where(enough, np.asarray(rates, float), 0.0), -1)


def quotient(above: Any, below: Any) -> Any:
    """One largest rate over another: infinite or 0 where only one of the two has any, 1 where neither has."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    known = np.where(below > 0, above / np.where(below > 0, below, 1.0), np.inf)
    return np.where((above == 0) & (below == 0), 1.0, known)


def slope(ratios: Any) -> Any:
    """Doublings of the ratio for each doubling of the depth, by least squares over `ratios [..., depths]`."""
    x = np.log2(DEPTHS) - np.mean(np.log2(DEPTHS))
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log2(np.asarray(ratios, float))
        fitted = np.sum(x * y, -1) / np.sum(x * x)
    # Infinite in the direction of the deepest network of which only one arm learned at all.
    lost = np.isinf(y)
    last = np.take_along_axis(y, np.argmax(np.where(lost, np.arange(len(DEPTHS)), -1), -1)[..., None], -1)[..., 0]
    return np.where(lost.any(-1), last, fitted)


def works(part: dict[str, Any], arm: str, *, finite: bool = False) -> np.ndarray:
    """Whether a run learned, or only stayed finite, `[seeds, rates]`."""
    stayed = np.asarray(part[arm]["finite"], bool)
    return stayed if finite else stayed & (np.asarray(part[arm]["train_accuracy"]) >= LEARNED)


def _resampled(parts: list[dict[str, Any]], *, finite: bool = False) -> Estimate:
    """The ratio of the largest rates, or its slope over several depths, with seeds drawn anew for the interval."""
    n = len(parts[0]["none"]["finite"])
    drawn = np.concatenate([np.arange(n)[None], np.random.default_rng(0).integers(n, size=(RESAMPLES, n))])
    ratios = [
        quotient(*(largest(part["rates"], works(part, arm, finite=finite)[drawn]) for arm in ("batch", "none")))
        for part in parts
    ]
    values = ratios[0] if len(parts) == 1 else slope(np.stack(ratios, -1))
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    how = f"of all seeds together, on a grid of factors of two, {LEVEL:.0%} bootstrap interval"
    return Estimate(float(values[0]), float(low), float(high), n, "", how)


def _tested(part: dict[str, Any], arm: str, limit: float | None, *, above: bool) -> np.ndarray:
    """Test accuracy of each seed at the rate with the best validation accuracy on one side of `limit`."""
    rates = np.asarray(part["rates"])
    side = np.ones(len(rates), bool) if limit is None else (rates > limit if above else rates <= limit)
    if not side.any():
        side = ~side
    accuracy = np.where(side, np.mean(part[arm]["val_accuracy"], 0), -math.inf)
    return np.asarray(part[arm]["test_accuracy"])[:, np.argmax(accuracy)]


def _above(part: dict[str, Any]) -> Estimate:
    """What rates above the plain network's largest are worth to the one with batch norm."""
    limit = float(largest(part["rates"], works(part, "none")))
    above, below = (_tested(part, "batch", limit, above=side) for side in (True, False))
    return mean(100 * (above - below), "pp", against=0.0)


def _name(depth: int) -> str:
    return f"depth_{depth}"


def draw(found: dict[str, Any], figure: Figure) -> str:
    """Training accuracy against the rate, the largest rates against depth, and test accuracy; the caption."""
    left, middle, right = figure.subplots(1, 3)
    main, small = found["depth_10"], found.get("small", found["depth_10"])
    arms = (("batch", "batch norm"), ("none", "no norm"))
    depths = [depth for depth in DEPTHS if _name(depth) in found]
    for at, (arm, name) in enumerate(arms):
        plots.band(left, main["rates"], 100 * np.asarray(main[arm]["train_accuracy"]), at, name)
        plots.band(right, small["rates"], 100 * np.asarray(small[arm]["test_accuracy"]), at, name)
        color, dashes = plots.STYLES[at]
        limits = [float(largest(found[_name(d)]["rates"], works(found[_name(d)], arm))) for d in depths]
        shown = [(d, limit) for d, limit in zip(depths, limits, strict=True) if limit]
        if shown:
            style = {"color": color, "ls": dashes, "marker": plots.MARKERS[at]}
            middle.plot(*zip(*shown, strict=True), label=name, **style)
            middle.set(xscale="log", yscale="log")
    left.axhline(100 * LEARNED, color="black", lw=0.8, ls=":")
    plots.finish(left, "learning rate", "training accuracy, %", "10 layers")
    plots.finish(middle, "hidden layers", "largest learning rate that learns", "by depth")
    plots.finish(right, "learning rate", "test accuracy, %", "10 layers, batches of 16")
    for panel in (left, right):
        panel.set_xscale("log")
    middle.set_xticks(depths, [str(d) for d in depths])
    middle.minorticks_off()
    for panel in (left, middle, right):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best", frameon=False, fontsize=8)
    n = len(main["none"]["finite"])
    return (
        f"Left and right: median and quartiles of n = {n} seeds. Middle: the largest rate at which seven of eight "
        "seeds learn; no marker where none does."
    )
