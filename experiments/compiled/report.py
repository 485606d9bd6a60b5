"""The tables: the bars, what each program moves, and what it keeps and sends."""

from collections.abc import Callable
from itertools import groupby

from experiments.compiled.bars import Records, Verdict
from experiments.compiled.cases import ALONE, BATCH, FLAX, INSIDE, JIT, NET, OURS, RESNET, STABLE, SWAPPED, Case
from experiments.compiled.measure import Record
from experiments.compiled.targets import BANDWIDTH, TARGETS
from experiments.tables import markdown

# On a GPU: x for the statistics; x and dy for the two sums; x and dy again, y and dx. The count on TPUs is the
# compiler's own, in which prefetches are reads as well; there flax's default is what to compare with.
LEAST = 7
HEAD = ("target", "devices", "way", "layout", "epilogue", "dtype")
INTRODUCTION = """
What XLA's compilers for TPUs and GPUs make of a training step, compiled on a machine that has neither. Nothing ran.
`alone`: the layer, forward and backward in one program, 32 examples of 28x28x128 a device. `net`: four times
convolution 3x3, layer and ReLU on the same. `ResNet-50`: 64 images of 224x224 a device; `swapped`: only the layer's
class is another; `inside`: the ReLUs that follow a layer are given to it. `flax, stable` has `use_fast_variance=False`.
`pmap` is deprecated and compiles to what `shard_map` does, and is left out.
"""
MOVED = """
Bytes read and written, over those of x on a device; for ResNet-50 in GiB. For TPUs the compiler's own count; for GPUs,
each operation's operands and results, a fusion as one. In parentheses, computed and not measured: the milliseconds
that a card takes to move as much at its published bandwidth ({bandwidths}). `rare pass`: what jaxbn moves in the steps
in which it goes over x again, the first ones and those after jumps; the column before is without. `least`: what no
layer can do without; for TPUs, and in networks, flax's default is what to compare with.
"""
KEPT = """
Temporary memory, over that of x on a device, for ResNet-50 in GiB; then the collectives and the bytes of their results.
"""
SUMMARY = """
Compiled, not run: bytes that a training step moves, of a network of four times convolution 3x3, layer and ReLU (over
those of its input, bfloat16), and of ResNet-50 (64 images a device), by `make compiled`
([every program](compiled/table.md)).
"""


def describe(case: Case, record: Record) -> str:
    """Return a line of the log."""
    if "error" in record:
        return f"{case.name}: failed: {record['error']}"
    x, rare = record["array_bytes"], record["moved_bytes_rare"]
    taken = "" if rare is None else f" ({rare / x:.2f} with the rare pass)"
    kept = f"temporary {record['temporary_bytes'] / x:.2f} x, {_list_sent(record)}"
    return f"{case.name}: moved {record['moved_bytes'] / x:.2f} x{taken}, {kept}; {record['seconds']} s"


def write_summary(found: Records) -> str:
    """Return what the networks move, for the page on speed: flax, jaxbn swapped in, and with the activation inside."""
    body = []
    for target in ("h100-8", "h100-256", "v5e-4", "v5e-256"):
        devices = f"{TARGETS[target].devices} {TARGETS[target].card}"
        for program, label, contenders in (
            (NET, "four convolutions", (FLAX, STABLE, "", OURS)),
            (RESNET, "ResNet-50, GiB", (FLAX, "", SWAPPED, INSIDE)),
        ):
            of = [Case(program, target, JIT, BATCH, "ReLU", "bfloat16", contender) for contender in contenders]
            body.append([f"{label}, {devices}", *(_moved(found, case, ".1f") for case in of)])
    head = ["", "flax", "flax, `use_fast_variance=False`", "jaxbn, import swapped", "jaxbn, ReLU inside"]
    return f"{markdown(head, body)}\n\n{SUMMARY.strip()}"


def write_sent(found: Records) -> str:
    """Return the collectives of one layer by the number of devices, for the page on devices."""
    body = []
    for target in ("h100-8", "h100-64", "h100-256", "h100-1024", "v5e-4", "v5e-64", "v5e-256", "v5p-4096"):
        row = [f"{TARGETS[target].devices:,} {TARGETS[target].card}"]
        for contender in (OURS, FLAX):
            record = found.get(Case(ALONE, target, JIT, BATCH, "ReLU", "bfloat16", contender))
            row.append(_list_sent(record, "{number} {kind}, {bytes:,} bytes", "") if record else "")
        body.append(row)
    return markdown(["devices", "jaxbn, with the rare second pass", "flax"], body)


def write_page(found: Records, wanted: list[Case], verdicts: list[Verdict]) -> str:
    """Return all results as Markdown."""
    versions = {f"{name} {v}" for r in found.values() for name, v in r["versions"].items()}
    bandwidths = ", ".join(f"{card} {rate / 1e9:,.0f} GB/s" for card, rate in BANDWIDTH.items())
    parts = ["# Compiled programs", INTRODUCTION.strip(), f"Compiled with {', '.join(sorted(versions))}."]
    parts += ["## Bars", write_bars(verdicts), "## Moved", MOVED.strip().format(bandwidths=bandwidths)]
    of = {program: [c for c in wanted if c.program == program] for program in dict.fromkeys(c.program for c in wanted)}
    parts += [v for p, chosen in of.items() for v in (f"### {p}, moved", write_moved(found, chosen))]
    parts += ["## Kept and sent", KEPT.strip()]
    parts += [v for p, chosen in of.items() for v in (f"### {p}, kept and sent", write_kept(found, chosen))]
    return "\n\n".join(parts) + "\n"


def write_bars(verdicts: list[Verdict]) -> str:
    """Return the table of bars."""
    body = [
        [v.what, f"<= {v.limit:g}", "" if v.value is None else f"{v.value:.3f}", v.where, str(v.cases), v.verdict]
        for v in verdicts
    ]
    return markdown(["bar", "limit", "worst", "where", "cases", "verdict"], body)


def write_moved(found: Records, wanted: list[Case]) -> str:
    """Return the table of the bytes moved by one kind of program."""

    def cell(case: Case, record: Record) -> str:
        milliseconds = 1e3 * record["moved_bytes"] / BANDWIDTH[TARGETS[case.target].card]
        return f"{record['moved_bytes'] / _unit(case, record):.2f} ({milliseconds:.3g} ms)"

    def rare(case: Case, record: Record) -> str:
        moved = record["moved_bytes_rare"]
        return "" if moved is None else f"{moved / _unit(case, record):.2f}"

    return _table(found, wanted, {"": cell, ", rare pass": rare}, least=True)


def write_kept(found: Records, wanted: list[Case]) -> str:
    """Return the table of temporaries and collectives of one kind of program."""

    def cell(case: Case, record: Record) -> str:
        return f"{record['temporary_bytes'] / _unit(case, record):.2f}; {_list_sent(record)}"

    return _table(found, wanted, {"": cell}, least=False)


def _table(found: Records, wanted: list[Case], cells: dict[str, Callable[[Case, Record], str]], least: bool) -> str:
    """Return a table with a row for each program, and columns for each contender; empty ones are left out."""
    contenders = dict.fromkeys(case.contender for case in wanted)
    head = [*HEAD, *(contender + end for contender in contenders for end in cells), *(["least"] if least else [])]
    rows = []
    for _, group in groupby(wanted, key=lambda case: case[:-1]):
        of = {case.contender: case for case in group}
        case = next(iter(of.values()))
        row = [TARGETS[case.target].card, f"{TARGETS[case.target].devices:,}", *case[2:-1]]
        row += [_cell(found, of.get(contender), write) for contender in contenders for write in cells.values()]
        rows.append(row + ([_least(found, case)] if least else []))
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return markdown([head[i] for i in used], [[row[i] for i in used] for row in rows])


def _cell(found: Records, case: Case | None, write: Callable[[Case, Record], str]) -> str:
    if case is None:
        return ""
    record = found.get(case)
    if record is None:
        return "not measured"
    return f"failed: {record['error'][:80]}" if "error" in record else write(case, record)


def _least(found: Records, case: Case) -> str:
    """Return the least that can be moved, or flax's default in its place."""
    if case.program == ALONE and case.kind == "gpu":
        return str(LEAST)
    flax = _moved(found, case._replace(contender=FLAX), ".2f")
    return flax and f"flax: {flax}"


def _moved(found: Records, case: Case, form: str) -> str:
    record = found.get(case, {})
    return format(record["moved_bytes"] / _unit(case, record), form) if "moved_bytes" in record else ""


def _list_sent(record: Record, form: str = "{number} {kind} ({bytes:,} B)", none: str = "no collectives") -> str:
    return ", ".join(form.format(kind=kind, **sent) for kind, sent in record.get("collectives", {}).items()) or none


def _unit(case: Case, record: Record) -> float:
    return 2.0**30 if case.program == RESNET else record["array_bytes"]
