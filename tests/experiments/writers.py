"""Run each command that writes to a folder, ended before it computes anything, and read the folder."""

from training_runs import QUICKSTART, TINY

from experiments.benchmark import command as benchmark
from experiments.claims._lib import command as claims
from experiments.interrupt import Interrupt
from experiments.training import command


def tree(folder):
    """All that is in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopped():
    """Return an interrupt that ends a run before its first step."""
    interrupt = Interrupt()
    interrupt.requested = True
    return interrupt


# Every command that writes to a folder, made to end before it computes anything.
WRITERS = {
    "run": lambda out, *more: command.main([str(QUICKSTART), *TINY, "--out", str(out), *more], stopped()),
    "claims": lambda out, *more: claims.main(
        ["--only", "initialization", "--smoke", "--out", str(out), *more], stopped()
    ),
    "benchmark": lambda out, *more: benchmark.main(["--quick", "--output", str(out), *more]),
}


def page(folder, marks):
    path = folder / "PAGE.md"
    path.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    return path
