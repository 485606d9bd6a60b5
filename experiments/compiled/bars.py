"""The bars of the compiled programs: limits that were set before, and whether the records keep them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from experiments.compiled import cases
from experiments.compiled.cases import ALONE, BATCH, FLAX, INSIDE, NET, NET_LAYERS, NONE, RESNET, SWAPPED, Case
from experiments.compiled.measure import Record

Records = dict[Case, Record]
MET, MISSED, UNKNOWN = "met", "missed", "not measured"
ALL_REDUCE, SMALL_BYTES, SMALL_SHARE = "all-reduce", 64 * 1024, 0.01


class Bar(NamedTuple):
    """A promise: of which cases, the most that is allowed, and what of a case is compared with it."""

    what: str
    applies: Callable[[Case], bool]
    limit: float
    value: Callable[[Records, Case], float]


class Verdict(NamedTuple):
    """A bar, its worst value and case, of how many cases, and the verdict in a word."""

    what: str
    limit: float
    value: float | None
    where: str
    cases: int
    verdict: str


def judge(found: Records, wanted: Iterable[Case]) -> list[Verdict]:
    """Return the verdict on each bar that applies to the wanted cases; a case that is missing or failed is a miss."""
    own = [case for case in wanted if case.ours]
    return [_judge(bar, found, chosen) for bar in BARS if (chosen := [c for c in own if bar.applies(c)])]


def _judge(bar: Bar, found: Records, chosen: list[Case]) -> Verdict:
    values: dict[Case, float] = {}
    for case in chosen:
        try:
            values[case] = bar.value(found, case)
        except KeyError:  # the record of the case, or of what it is compared with
            return Verdict(bar.what, bar.limit, None, case.name, len(chosen), UNKNOWN)
    worst = max(values, key=lambda case: values[case])
    # Compared as printed, so that a table never seems to contradict itself.
    verdict = MET if round(values[worst], 3) <= bar.limit else MISSED
    return Verdict(bar.what, bar.limit, values[worst], worst.name, len(chosen), verdict)


def compare_moved(found: Records, case: Case) -> float:
    """Return the bytes moved over flax's default's."""
    return found[case]["moved_bytes"] / found[case._replace(contender=FLAX)]["moved_bytes"]


def compare_temporaries(found: Records, case: Case) -> float:
    """Return the temporary memory beyond flax's default's for each layer, over x."""
    record, flax = found[case], found[case._replace(contender=FLAX)]
    return (record["temporary_bytes"] - flax["temporary_bytes"]) / record["array_bytes"] / _layers(case)


def count_all_reduces(found: Records, case: Case) -> float:
    """Return the all-reduces for each layer."""
    return _sent(found, case, "number", lambda kind: kind == ALL_REDUCE) / _layers(case)


def count_others(found: Records, case: Case) -> int:
    """Return the collectives other than all-reduces."""
    return _sent(found, case, "number", lambda kind: kind != ALL_REDUCE)


def compare_sent(found: Records, case: Case) -> float:
    """Return the bytes sent for each layer over what may be: 64 KiB or four times flax's, whichever is more."""
    own, flax = (_sent(found, c, "bytes") / _layers(case) for c in (case, case._replace(contender=FLAX)))
    return own / max(SMALL_BYTES, 4 * flax)


def find_largest(found: Records, case: Case) -> float:
    """Return the bytes of the largest collective that is no all-reduce, over x."""
    others = (sent["largest"] for kind, sent in found[case]["collectives"].items() if kind != ALL_REDUCE)
    return max(others, default=0) / found[case]["array_bytes"]


def _sent(found: Records, case: Case, field: str, counts: Callable[[str], bool] = lambda kind: True) -> int:
    """Return the sum of a field over the kinds of collectives that count, beyond the net's without normalization."""

    def total(contender: str) -> int:
        sent = found[case._replace(contender=contender)]["collectives"]
        return sum(own[field] for kind, own in sent.items() if counts(kind))

    return total(case.contender) - (total(NONE) if case.program == NET else 0)


def _layers(case: Case) -> int:
    return NET_LAYERS if case.program == NET else 1


def _select(
    program: str, kind: str | None = None, dtype: str | None = None, contender: str | None = None
) -> Callable[[Case], bool]:
    def applies(case: Case) -> bool:
        wanted = ((case.program, program), (case.kind, kind), (case.dtype, dtype), (case.contender, contender))
        return case.layout == BATCH and all(limit in (None, value) for value, limit in wanted)

    return applies


def _is_plain(case: Case) -> bool:
    return case.program != RESNET and case.layout == BATCH


BARS = (
    Bar("net, TPU: moved, over flax", _select(NET, "tpu"), 1.01, compare_moved),
    Bar("net, H100, bfloat16: moved, over flax", _select(NET, "gpu", "bfloat16"), 0.94, compare_moved),
    Bar("net, H100, float32: moved, over flax", _select(NET, "gpu", "float32"), 1.01, compare_moved),
    Bar("alone, TPU: moved, over flax", _select(ALONE, "tpu"), 1.02, compare_moved),
    Bar("alone, H100, bfloat16: moved, over flax", _select(ALONE, "gpu", "bfloat16"), 0.75, compare_moved),
    Bar("alone, H100, float32: moved, over flax", _select(ALONE, "gpu", "float32"), 0.75, compare_moved),
    Bar("ResNet-50, layers swapped: moved, over flax", _select(RESNET, contender=SWAPPED), 1.0, compare_moved),
    Bar("ResNet-50, ReLUs inside: moved, over flax", _select(RESNET, contender=INSIDE), 0.98, compare_moved),
    Bar("all-reduces a layer", _is_plain, 3, count_all_reduces),
    Bar("collectives of other kinds", _is_plain, 0, count_others),
    Bar("bytes sent a layer, over 64 KiB or four times flax's", _is_plain, 1, compare_sent),
    Bar(
        "corner cases: the largest gather, permute or all-to-all, over x",
        lambda c: c.layout != BATCH or c.target in cases.ODD,
        SMALL_SHARE,
        find_largest,
    ),
    Bar("temporaries a layer beyond flax's, over x", lambda c: c.program != RESNET, 0.1, compare_temporaries),
)
