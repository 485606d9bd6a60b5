"""Records of claims, judged: estimates, the verdict on each, and the answer."""

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

from experiments import disk
from experiments.claims._lib import verdict
from experiments.claims._lib.config import ClaimConfig
from experiments.claims._lib.intervals import Estimate
from experiments.claims._lib.values import numbers

RESULT, CHECKS = "result.json", "checks.json"
REMEDY = "Delete it, and run the claim again."
SMOKE = "smoke run: means nothing"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with its estimates and the verdicts on its parts."""

    config: ClaimConfig
    record: dict[str, Any]
    estimates: verdict.Estimates
    parts: list[verdict.Part]

    @property
    def answer(self) -> str:
        """The answer in one sentence; of a smoke run, that there is none."""
        if self.record["smoke"]:
            return f"None ({SMOKE})."
        return verdict.answer(self.config.criteria, self.parts, self.estimates)

    @property
    def said(self) -> str:
        """The answer in a word."""
        return SMOKE if self.record["smoke"] else verdict.overall(self.config.criteria, self.parts)

    def headline(self, *, brief: bool = False) -> str:
        """Return the answer in Markdown, with the word for it in bold; `brief` without the n needed."""
        said, answer = self.said.capitalize(), self.answer
        if brief and not self.record["smoke"]:
            answer = verdict.answer(self.config.criteria, self.parts, self.estimates, brief=True)
        return f"**{said}**{answer[len(said) :]}" if answer.startswith(said) else f"**{said}.** {answer}"

    def outcome(self) -> dict[str, Any]:
        """Return the bounds and the outcome of each criterion, to be kept beside those of later rules."""
        return {
            c.key: {"bounds": c.bounds, "decides": bool(c.scope), "verdict": part.verdict}
            | {k: getattr(e, k) for k in ("value", "low", "high")}
            for c, part in zip(self.config.criteria, self.parts, strict=True)
            if (e := self.estimates[c.key])
        }

    def rows(self) -> list[list[str]]:
        """Return a row for each criterion: text, number, bounds, verdict; what is folded away comes last."""
        found = []
        for c, part in zip(self.config.criteria, self.parts, strict=True):
            said = part.verdict or ""
            if said and not c.scope:
                said += " (reported only)"
            e = self.estimates[c.key]
            notes = [said, e.caveat if e else "", _otherwise(part), *self.apart(c.key), self.changed(c)]
            found.append((not c.scope, not c.shown, [c.text, number(e), c.bounds, *notes]))
        ordered = [row for _, _, row in sorted(found, key=lambda f: f[:2])]
        return [[*row[:3], "; ".join(filter(None, row[3:]))] for row in ordered]

    def apart(self, key: str) -> list[str]:
        """Return the numbers of checks whose intervals do not meet that of the measurement."""
        e, found = self.estimates[key], []
        for kind, cases in checked(self.config, self.record).items():
            if e and key in cases:
                value, low, high = (cases[key][k] for k in ("value", "low", "high"))
                if low > e.high or high < e.low:
                    again = dataclasses.replace(e, value=value, low=low, high=high)
                    found.append(f"{number(again, brief=True)} with {verdict.CHECKS[kind]}")
        return found

    def changed(self, c: verdict.Criterion) -> str:
        """Say how a criterion differs from that of the first measurement, and the outcome then."""
        before = self.record["first"].get(c.key)
        if before is None:
            return "added after results" if c.scope else ""
        now, then = ((d, b) for d, b in ((bool(c.scope), c.bounds), (before["decides"], before["bounds"])))
        if not (now[0] or then[0]):
            return ""
        value = before["value"]
        outcome = ", ".join(filter(None, [before["verdict"], _digits(value) if isinstance(value, float) else ""]))
        if now == then:
            again = self.parts[self.config.criteria.index(c)].verdict
            return f"first measured: {outcome}" if again != before["verdict"] else ""
        rule = f"{'decided' if then[0] else 'reported only'}{f', {then[1]}' if then[1] else ''}"
        return f"changed after results; before: {rule}, {outcome}"


def _otherwise(part: verdict.Part) -> str:
    """Say what checks a part did not stand."""
    others = [f"{said} with {verdict.CHECKS[kind]}" for kind, said in part.otherwise.items()]
    return verdict.listed([f"{part.measured} here", *others]) if others else ""


def module(config: ClaimConfig, kind: str) -> Any:
    """Import the module of a claim that measures or judges."""
    return importlib.import_module(f"experiments.claims.{config.name}.{kind}")


def read(kept: Path, configs: list[ClaimConfig]) -> list[dict[str, Any] | None]:
    """Read the record of each claim, with the verdicts of its checks; or None.

    Raises:
        DiskError: one is damaged.
    """
    found: list[dict[str, Any] | None] = []
    for folder in (kept / c.name for c in configs):
        measured, of_checks = (
            numbers(disk.read_checked(path, REMEDY)) if path.is_file() else {}
            for path in (folder / RESULT, folder / CHECKS)
        )
        found.append(measured | {"checks": of_checks} if measured else None)
    return found


def judge(config: ClaimConfig, record: dict[str, Any]) -> Judged:
    """Judge a record by the config as it is now."""
    estimates = module(config, "judge").estimates(record["measured"])
    missing = {c.key for c in config.criteria} ^ set(estimates)
    if missing:
        raise RuntimeError(f"{config.name}: criteria and estimates must have the same keys; not in both: {missing}.")
    said = {kind: {k: case["verdict"] for k, case in cases.items()} for kind, cases in checked(config, record).items()}
    return Judged(config, record, estimates, verdict.judge(config.criteria, estimates, said))


def checked(config: ClaimConfig, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cases of the checks of this very record, by criteria as they are now: by kind and key."""
    now = {c.key: c.bounds for c in config.criteria}
    return {
        kind: {key: case for key, case in check["cases"].items() if case["bounds"] == now.get(key)}
        for kind, check in record.get("checks", {}).items()
        if check["of"] == record["program"]
    }


def number(e: Estimate | None, *, brief: bool = False) -> str:
    """Return a number with its interval, and with n unless `brief`."""
    if e is None:
        return "not measured yet"
    value, low, high = (_digits(v) for v in (e.value, e.low, e.high))
    unit = e.unit if e.unit == "%" else f" {e.unit}" if e.unit else ""
    wide = f" ({low} to {high})" if low != value or high != value else ""
    return f"{value}{unit}{wide}" + ("" if brief or e.n == 1 else f", n = {e.n}")


def _digits(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value and not 1e-3 <= size < 1e6:
        return f"{value:.1e}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"
