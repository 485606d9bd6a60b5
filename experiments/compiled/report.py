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


def write_summary(found: Records) -> str:
    """Return what the networks move, for the page on speed: flax, jaxbn swapped in, and with the activation inside."""
    body = []
    for target in ("h100-8", "h100-256", "v5e-4", "v5e-256"):
        card, n = TARGETS[target].card, TARGETS[target].devices
        case = Case(NET, target, JIT, BATCH, "ReLU", "bfloat16", OURS)
        cells = [_moved(found, case._replace(contender=c)) for c in (FLAX, STABLE, "", OURS)]
        body.append([f"four convolutions, {n} {card}", *cells])
        case = case._replace(program=RESNET)
        cells = [_moved(found, case._replace(contender=c)) for c in (FLAX, "", SWAPPED, INSIDE)]
        body.append([f"ResNet-50, GiB, {n} {card}", *cells])
    head = ["", "flax", "flax, `use_fast_variance=False`", "jaxbn, import swapped", "jaxbn, ReLU inside"]
    return f"{markdown(head, body)}\n\n{SUMMARY.strip()}"


def _moved(found: Records, case: Case) -> str:
    record = found.get(case, {})
    return f"{record['moved_bytes'] / _unit(case, record):.1f}" if "moved_bytes" in record else ""


def write_sent(found: Records) -> str:
    """Return the collectives of one layer by the number of devices, for the page on devices."""
    body = []
    for target in ("h100-8", "h100-64", "h100-256", "h100-1024", "v5e-4", "v5e-64", "v5e-256", "v5p-4096"):
        case = Case(ALONE, target, JIT, BATCH, "ReLU", "bfloat16", OURS)
        row = [f"{TARGETS[target].devices:,} {TARGETS[target].card}"]
        for contender in (OURS, FLAX):
            sent = found.get(case._replace(contender=contender), {}).get("collectives", {})
            row.append(", ".join(f"{s['number']} {kind}, {s['bytes']:,} bytes" for kind, s in sent.items()))
        body.append(row)
    return markdown(["devices", "jaxbn, with the rare second pass", "flax"], body)


def write_page(found: Records, wanted: list[Case], verdicts: list[Verdict]) -> str:
    """Return all results as Markdown."""
    versions = {f"{name} {v}" for r in found.values() for name, v in r["versions"].items()}
    bandwidths = ", ".join(f"{card} {rate / 1e9:,.0f} GB/s" for card, rate in BANDWIDTH.items())
    parts = ["# Compiled programs", INTRODUCTION.strip(), f"Compiled with {', '.join(sorted(versions))}."]
    parts += ["## Bars", write_bars(verdicts), "## Moved", MOVED.strip().format(bandwidths=bandwidths)]
    programs = list(dict.fromkeys(case.program for case in wanted))
    parts += [v for p in programs for v in (f"### {p}, moved", write_moved(found, _of(wanted, p)))]
    parts += ["## Kept and sent", KEPT.strip()]
    parts += [v for p in programs for v in (f"### {p}, kept and sent", write_kept(found, _of(wanted, p)))]
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
        moved = record["moved_bytes"]
        milliseconds = 1e3 * moved / BANDWIDTH[TARGETS[case.target].card]
        return f"{moved / _unit(case, record):.2f} ({milliseconds:.3g} ms)"

    def rare(case: Case, record: Record) -> str:
        moved = record["moved_bytes_rare"]
        return "" if moved is None else f"{moved / _unit(case, record):.2f}"

    return _table(found, wanted, {"": cell, ", rare pass": rare}, least=True)


def write_kept(found: Records, wanted: list[Case]) -> str:
    """Return the table of temporaries and collectives of one kind of program."""

    def cell(case: Case, record: Record) -> str:
        sent = ", ".join(f"{s['number']} {kind} ({s['bytes']:,} B)" for kind, s in record["collectives"].items())
        return f"{record['temporary_bytes'] / _unit(case, record):.2f}; {sent or 'no collectives'}"

    return _table(found, wanted, {"": cell}, least=False)


def _table(found: Records, wanted: list[Case], cells: dict[str, Callable[[Case, Record], str]], least: bool) -> str:
    """Return a table with a row for each program, and columns for each contender; empty ones are left out."""
    rows = [list(group) for _, group in groupby(wanted, key=lambda case: case[:-1])]
    contenders = dict.fromkeys(case.contender for case in wanted)
    columns = [(contender, end) for contender in contenders for end in cells]
    body = []
    for group in rows:
        case = group[0]
        by_contender = {c.contender: c for c in group}
        row = {(c, e): _cell(found, by_contender.get(c), cells[e]) for c, e in columns}
        target = TARGETS[case.target]
        left = [target.card, f"{target.devices:,}", case.way, case.layout, case.epilogue, case.dtype]
        body.append((left, row, _least(found, case)))
    used = [key for key in columns if any(row[key] for _, row, _ in body)]
    head = [*HEAD, *("".join(key) for key in used), *(["least"] if least else [])]
    return markdown(head, [[*left, *(row[k] for k in used), *([low] if least else [])] for left, row, low in body])


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
    record = found.get(case._replace(contender=FLAX), {})
    return f"flax: {record['moved_bytes'] / _unit(case, record):.2f}" if "moved_bytes" in record else ""


def _unit(case: Case, record: Record) -> float:
    return 2.0**30 if case.program == RESNET else record["array_bytes"]


def _of(wanted: list[Case], program: str) -> list[Case]:
    return [case for case in wanted if case.program == program]
