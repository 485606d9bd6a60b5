"""The bars: limits that were set before, and whether the measurements keep them."""

import math
from statistics import geometric_mean
from typing import Any

from experiments.benchmark.sizes import OURS, RESNET_50, TORCH

Results = dict[str, Any]
Group = tuple[str, str]  # dtype and epilogue


def ratios(results: Results, program: str, peer: str) -> dict[Group, dict[str, float]]:
    """Return by dtype and epilogue, and by size, the median over the rounds of our time over the peer's."""
    found: dict[Group, dict[str, float]] = {}
    for row in results["times"]:
        if (row["program"], row["contender"]) == (program, peer):
            found.setdefault((row["dtype"], row["epilogue"]), {})[row["size"]] = row["ours_to_theirs"]["median"]
    return found


def value(results: Results, measure: str, contender: str, **labels: Any) -> Any:
    """Return the value of the one row with these labels; None if it was not measured."""
    wanted = {"measure": measure, "contender": contender, **labels}
    found = [row["value"] for row in results["measures"] if all(row.get(k) == v for k, v in wanted.items())]
    return found[0] if found else None


def resnet(plan: dict[str, Any]) -> str:
    """Name the network that a plan trains."""
    return "ResNet-50" if tuple(plan["stages"]) == RESNET_50 else "a short ResNet"


def verdict(measured: float | None, limit: float) -> str:
    """Compare a value as it is printed, so that the table never seems to contradict itself."""
    if measured is None:
        return "not measured"
    return "met" if round(measured, 2) <= limit else "missed"


def bars(results: Results) -> list[dict[str, Any]]:
    """Return a row for each bar: what, the limit, what was measured and where it was worst, and the verdict.

    Of times the geometric mean over all sizes, dtypes and epilogues; then over the sizes alone, for the worst dtype and
    epilogue.
    """
    plan, both = results["plan"], "forward+backward"
    cpu, gpu = (results["hardware"]["platform"] == platform for platform in ("cpu", "gpu"))
    rows: list[dict[str, Any]] = []

    def bar(what: str, limit: float, measured: float | None, where: str = "") -> None:
        shown = None if measured is None or math.isinf(measured) else measured
        row = {"bar": what, "limit": f"<= {limit:g}", "value": shown, "where": where}
        rows.append(row | {"verdict": verdict(measured, limit)})

    def times(what: str, limit: float, program: str, peer: str, here: bool, worst: float | None = None) -> None:
        found = ratios(results, program, peer) if here else {}
        every = [v for by_size in found.values() for v in by_size.values()]
        bar(what, limit, geometric_mean(every) if every else None)
        grouped = {f"{d}, {e}": geometric_mean(by_size.values()) for (d, e), by_size in found.items()}
        bar(f"{what}: worst dtype and epilogue", worst or limit, *_worst(grouped))

    def over_flax(what: str, limit: float, measure: str, ours: str = "", here: bool = True, **labels: Any) -> None:
        pair = ((ours or measure, OURS), (measure, "flax"))
        own, flax = (value(results, m, name, **labels) if here else None for m, name in pair)
        bar(what, limit, None if own is None or flax is None else own / flax)

    times("CPU, forward+backward over flax", 0.7, both, "flax", cpu, worst=0.85)
    sizes = ratios(results, both, "flax") if cpu else {}
    each = {f"{d}, {e}, {size}": v for (d, e), by_size in sizes.items() for size, v in by_size.items()}
    bar("CPU, forward+backward over flax: worst size", 1.1, *_worst(each))
    times("CPU, forward+backward over flax with `use_fast_variance=False`", 0.6, both, "flax, stable", cpu, worst=0.7)
    forward = [v for (d, _), by in ratios(results, "forward", "flax").items() if d == "float32" for v in by.values()]
    bar("CPU, forward in training over flax, float32", 1.1, geometric_mean(forward) if cpu and forward else None)
    over_flax("CPU, a jitted call of a tiny layer over flax", 1.0, "dispatch", here=cpu, call="jitted")
    times("CPU, forward+backward over torch channels_last", 0.8, both, TORCH, cpu)
    best = _best(results, "evaluation")
    times(f"CPU, evaluation over the best peer, {best}", 1.0, "evaluation", best, cpu)
    for dtype, size in (("float32", 4.0), ("bfloat16", 2.0)):
        kept = value(results, "kept", OURS, dtype=dtype, epilogue="relu")
        # What is kept of each feature is not counted against x.
        bar(f"bytes kept per element with ReLU, {dtype}", size, None if kept is None else round(kept, 1))
    loop = f"temporary memory of {plan['scanned']} conv-norm-ReLU layers under `lax.scan`, rematerialized"
    for dtype, limit in (("float32", 0.5), ("bfloat16", 0.35)):
        ours = "temporary, scan, rematerialized"
        over_flax(f"{loop}, over flax's plain loop, {dtype}", limit, "temporary, scan", ours, dtype=dtype)
    counts = {
        r["way"]: math.inf if r["value"] is None else float(r["value"])
        for r in results["measures"]
        if (r["measure"], r["contender"]) == ("collectives", OURS)
    }
    bar("collectives of a layer in a training step on 8 devices", 3.0, *_worst(counts))
    compiling = f"trace and compile time of {plan['deep']} layers over flax"
    over_flax(compiling, 1.0, "compile time", part="trace + compile")
    for what, measure in (("step time", "step time"), ("peak memory", "peak")):
        over_flax(f"{what} of ResNet-20 over flax", 1.0, f"{measure}, ResNet-20")
    times("GPU, forward+backward over torch channels_last", 1.0, both, TORCH, gpu)
    for what, measure in (("step time", "step time"), ("peak memory", "peak")):
        over_flax(f"GPU, {what} of {resnet(plan)} over flax", 1.0, f"{measure}, ResNet", here=gpu)
    return rows


def _worst(found: dict[str, float]) -> tuple[float | None, str]:
    if not found:
        return None, ""
    where = max(found, key=lambda k: found[k])
    return found[where], where


def _best(results: Results, program: str) -> str:
    """Return the peer over which our time is the most, in the geometric mean over everything."""
    peers = dict.fromkeys(r["contender"] for r in results["times"] if r["contender"] != OURS)

    def over(peer: str) -> float:
        return geometric_mean(v for by_size in ratios(results, program, peer).values() for v in by_size.values())

    return max(peers, key=over)
