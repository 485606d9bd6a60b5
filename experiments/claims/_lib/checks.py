"""Checks of the answers: claims are measured again with a wider grid, twice the steps, other splits, or elsewhere."""

from pathlib import Path
from typing import Any

from experiments import disk
from experiments.claims._lib import verdict
from experiments.claims._lib.config import ClaimConfig
from experiments.claims._lib.judged import CHECKS, REMEDY, Judged, checked, judge
from experiments.claims._lib.values import plain
from experiments.tables import markdown


def keep(folder: Path, kind: str, config: ClaimConfig, record: dict[str, Any], published: dict[str, Any]) -> None:
    """Write the outcome of a check of the record `published` in `folder` beside those of other kinds."""
    path = folder / CHECKS
    kept = disk.read_checked(path, REMEDY) if path.is_file() else {}
    cases = {key: case for key, case in alone(config, record).outcome().items() if case["decides"]}
    kept[kind] = {"of": published["program"], "seconds": record["seconds"], "cases": cases}
    disk.write_checked(path, plain(kept))


def alone(config: ClaimConfig, record: dict[str, Any]) -> Judged:
    """Judge a record as if nothing had been checked."""
    return judge(config, record | {"smoke": False, "checks": {}})


def compare(config: ClaimConfig, kind: str, again: dict[str, Any], published: dict[str, Any]) -> int:
    """Print the answer of the check beside that of the measurement; return how many decided cases differ."""
    new, old = alone(config, again), alone(config, published)
    print(f"{config.number}. {config.name}\n   published: {old.answer}\n   with {verdict.CHECKS[kind]}: {new.answer}")
    differ = 0
    for c, a, b in zip(config.criteria, old.parts, new.parts, strict=True):
        if c.scope and a.verdict != b.verdict:
            differ += a.verdict != "undecided"
            print(f"   {c.scope}: {a.verdict} before, {b.verdict} in the check")
    return differ


def stood(found: list[Judged]) -> str:
    """Return one row for each claim: of its decided cases how many came out alike in each check."""
    rows, totals = [], {kind: [0, 0, 0] for kind in verdict.CHECKS}
    for j in found:
        parts = [(c.key, p.measured or p.verdict) for c, p in zip(j.config.criteria, j.parts, strict=True) if c.scope]
        cells = []
        for kind, total in totals.items():
            cases = {key: case["verdict"] for key, case in checked(j.config, j.record).get(kind, {}).items()}
            alike = [cases[key] == said for key, said in parts if key in cases and said != "undecided"]
            more = sum(cases.get(key, said) != said for key, said in parts if said == "undecided")
            total[:] = total[0] + sum(alike), total[1] + len(alike), total[2] + more
            cells.append(_alike(sum(alike), len(alike), more) if cases else "not measured")
        rows.append([f"[{j.config.number}]({j.config.name}.md)", *cells])
    rows.append(["all", *(_alike(*total) for total in totals.values())])
    return markdown(["claim", *verdict.CHECKS.values()], rows)


def _alike(alike: int, decided: int, more: int) -> str:
    return f"{alike} of {decided}" + (f", and {more} decided that {'were' if more > 1 else 'was'} not" if more else "")
