"""The bars: limits that were set before, and whether the measurements keep them."""

import math
from collections.abc import Iterable
from typing import Any

from experiments.benchmark.sizes import OURS, RESNET_50

Results = dict[str, Any]
Group = tuple[str, str]  # dtype and epilogue


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


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
    platform, plan, both = results["hardware"]["platform"], results["plan"], "forward+backward"
    cpu, gpu = platform == "cpu", platform == "gpu"
    rows: list[dict[str, Any]] = []

    def bar(what: str, measured: tuple[float | None, str], limit: float) -> None:
        rows.append(
            {
                "bar": what,
                "limit": f"<= {limit:g}",
                "value": measured[0] if measured[0] is None or math.isfinite(measured[0]) else None,
                "where": measured[1],
                "verdict": verdict(measured[0], limit),
            }
        )

    def times(what: str, program: str, peer: str, limit: float, here: bool) -> None:
        found = ratios(results, program, peer) if here else {}
        every = [v for by_size in found.values() for v in by_size.values()]
        bar(what, (geometric_mean(every) if every else None, ""), limit)
        grouped = {f"{d}, {e}": geometric_mean(by_size.values()) for (d, e), by_size in found.items()}
        bar(f"{what}: worst dtype and epilogue", _worst(grouped), limit)

    times("CPU, forward+backward over flax", both, "flax", 0.85, cpu)
    sizes = ratios(results, both, "flax") if cpu else {}
    each = {f"{d}, {e}, {size}": v for (d, e), by_size in sizes.items() for size, v in by_size.items()}
    bar("CPU, forward+backward over flax: worst size", _worst(each), 1.1)
    times("CPU, forward+backward over flax with `use_fast_variance=False`", both, "flax, stable", 0.7, cpu)
    times("CPU, forward+backward over torch channels_last", both, "torch, channels_last", 0.8, cpu)
    best = _best(results, "evaluation")
    times(f"CPU, evaluation over the best peer, {best}", "evaluation", best, 1.0, cpu)
    for dtype, size in (("float32", 4.0), ("bfloat16", 2.0)):
        kept = value(results, "kept", OURS, dtype=dtype, epilogue="relu")
        # What is kept of each feature is not counted against x.
        bar(f"bytes kept per element with ReLU, {dtype}", (None if kept is None else round(kept, 1), ""), size)
    for dtype, limit in (("float32", 0.5), ("bfloat16", 0.35)):
        own = value(results, "temporary, scan, rematerialized", OURS, dtype=dtype)
        flax = value(results, "temporary, scan", "flax", dtype=dtype)
        ratio = None if own is None or flax is None else own / flax
        layers = f"{plan['scanned']} conv-norm-ReLU layers"
        what = f"temporary memory of {layers} under `lax.scan`, rematerialized, over flax's plain loop"
        bar(f"{what}, {dtype}", (ratio, ""), limit)
    counts = {
        r["way"]: r["value"] for r in results["measures"] if (r["measure"], r["contender"]) == ("collectives", OURS)
    }
    counts = {way: math.inf if count is None else float(count) for way, count in counts.items()}
    bar("collectives of a layer in a training step on 8 devices", _worst(counts), 3.0)
    own, flax = (value(results, "compile time", n, part="trace + compile") for n in (OURS, "flax"))
    bar(f"trace and compile time of {plan['deep']} layers over flax", (None if own is None else own / flax, ""), 1.0)
    for what, measure in (("step time", "step time, ResNet-20"), ("peak memory", "peak, ResNet-20")):
        own, flax = (value(results, measure, n) for n in (OURS, "flax"))
        bar(f"{what} of ResNet-20 over flax", (None if own is None else own / flax, ""), 1.0)
    times("GPU, forward+backward over torch channels_last", both, "torch, channels_last", 1.0, gpu)
    for what, measure in (("step time", "step time, ResNet"), ("peak memory", "peak, ResNet")):
        own, flax = (value(results, measure, n) if gpu else None for n in (OURS, "flax"))
        bar(f"GPU, {what} of {resnet(plan)} over flax", (None if own is None or flax is None else own / flax, ""), 1.0)
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
