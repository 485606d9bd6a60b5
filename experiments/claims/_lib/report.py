"""The report: a page with the table of all answers, and a page for each claim, in Markdown with figures.

Every number comes from a claim's record. The words of its page are a Jinja template, `page.md`, of two parts and a line
`---` between: the advice, and the text that is folded away. In it `{{ key }}` is the number of the criterion of that
name, `value.key` the plain number, `verdict.key` the verdict on it, and `first.key` its outcome in the first run.
"""

import dataclasses
import importlib
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments import disk
from experiments.claims._lib import plots, study, verdict
from experiments.claims._lib.config import ClaimConfig
from experiments.claims._lib.intervals import Estimate
from experiments.tables import markdown, put

RESULT, LIB = "result.json", Path(__file__).parent
MARKS = ("<!-- claims -->", "<!-- /claims -->")
SHOWN = 5  # rows of a page that are not folded away
SMOKE = "smoke run: means nothing"
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


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
            notes = [said, e.caveat if e else "", self.changed(c)]
            found.append((not c.scope, not c.shown, [c.text, number(e), c.bounds, *notes]))
        ordered = [row for _, _, row in sorted(found, key=lambda f: f[:2])]
        return [[*row[:3], "; ".join(filter(None, row[3:]))] for row in ordered]

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


def module(config: ClaimConfig, kind: str) -> Any:
    """Import the module of a claim that measures or judges."""
    return importlib.import_module(f"experiments.claims.{config.name}.{kind}")


def read(kept: Path, configs: list[ClaimConfig]) -> list[dict[str, Any] | None]:
    """Read the record of each claim, or None.

    Raises:
        DiskError: one is damaged.
    """
    paths = [kept / c.name / RESULT for c in configs]
    remedy = "Delete it, and run the claim again."
    return [study.numbers(disk.read_checked(path, remedy)) if path.is_file() else None for path in paths]


def judge(config: ClaimConfig, record: dict[str, Any]) -> Judged:
    """Judge a record by the config as it is now."""
    estimates = module(config, "judge").estimates(record["measured"])
    missing = {c.key for c in config.criteria} ^ set(estimates)
    if missing:
        raise RuntimeError(f"{config.name}: criteria and estimates must have the same keys; not in both: {missing}.")
    return Judged(config, record, estimates, verdict.judge(config.criteria, estimates))


def write(pages: Path, configs: list[ClaimConfig], records: list[dict[str, Any] | None]) -> None:
    """Write `index.md`, and a page and a figure for each claim, to `pages`."""
    found = [judge(c, r) if r else None for c, r in zip(configs, records, strict=True)]
    for j in found:
        if j:
            alt, caption = draw(j, pages / f"{j.config.name}.png")
            disk.write(pages / f"{j.config.name}.md", chapter(j, alt, caption))
    context = {"table": table(found, configs, ""), "conditions": conditions([r for r in records if r])}
    context["sentences"] = sentences([j for j in found if j])
    context["bibliography"] = (LIB / "bibliography.md").read_text(encoding="utf-8").strip()
    disk.write(pages / "index.md", _template(LIB / "index.md").render(context) + "\n")


def table(found: list[Judged | None], configs: list[ClaimConfig], to: str, *, brief: bool = False) -> str:
    """Return one row for each claim: answer, and unless `brief` effect with interval and where it was tested.

    `to` leads to the pages.
    """
    rows = []
    for j, c in zip(found, configs, strict=True):
        if j is None:
            rows.append([f"{c.number}. {c.claim}", "not measured", "", c.where])
        else:
            first = c.criteria[0]
            effect = f"{first.text}: {number(j.estimates[first.key])}"
            answer = verdict.answer(c.criteria, j.parts, j.estimates, brief=True) if brief else j.answer
            rows.append(
                [f"[{c.number}. {c.claim}]({to}{c.name}.md)", f"**{j.said.capitalize()}.** {answer}", effect, c.where]
            )
    head, shown = ["claim", "answer", "effect, 95% interval", "tested on"], 2 if brief else 4
    return markdown(head[:shown], [row[:shown] for row in rows])


def sentences(found: list[Judged]) -> str:
    """Return one row for each further sentence of the source texts: verdict, number and claim."""
    rows = [
        [
            c.sentence,
            f"{'' if j.record['smoke'] else part.verdict or ''}",
            f"{c.text}: {number(j.estimates[c.key])}",
            f"[{j.config.number}]({j.config.name}.md)",
        ]
        for j in found
        for c, part in zip(j.config.criteria, j.parts, strict=True)
        if c.sentence
    ]
    return markdown(["sentence", "answer", "number, 95% interval", "claim"], rows)


def put_table(page: Path, pages: Path, configs: list[ClaimConfig], records: list[dict[str, Any] | None]) -> None:
    """Put the table of answers between the marks of `page`."""
    found = [judge(c, r) if r else None for c, r in zip(configs, records, strict=True)]
    to = os.path.relpath(pages.resolve(), page.resolve().parent) + "/"
    put(page, table(found, configs, to, brief=True), MARKS)


def chapter(j: Judged, alt: str, caption: str) -> str:
    """Return the page of one claim."""
    c, r, rows = j.config, j.record, j.rows()
    head = ["measured", "number, 95% interval", "criterion", "verdict"]
    context: dict[str, Any] = {"c": c, "j": j, "r": r, "alt": alt, "caption": caption, "smoke": r["smoke"]}
    context |= {"rows": markdown(head, rows[:SHOWN]), "more": markdown(head, rows[SHOWN:]) if rows[SHOWN:] else ""}
    judged = module(c, "judge")
    context["tables"] = judged.tables(r["measured"]) if hasattr(judged, "tables") else ""
    context["how"] = "; ".join(sorted({e.how for e in j.estimates.values() if e}))
    if r["smoke"]:
        context |= {"advice": "", "rest": ""}
    else:
        values: dict[str, Any] = {k: number(e, brief=True) for k, e in j.estimates.items()}
        values["value"] = SimpleNamespace(**{k: e and e.value for k, e in j.estimates.items()})
        values["first"] = r["first"]
        values["verdict"] = SimpleNamespace(**{x.key: p.verdict for x, p in zip(c.criteria, j.parts, strict=True)})
        words = _template(study.ROOT / "experiments" / "claims" / c.name / "page.md").render(values)
        context["advice"], context["rest"] = (part.strip() for part in words.split("\n---\n"))
    return _template(LIB / "chapter.md").render(context) + "\n"


def draw(j: Judged, path: Path) -> tuple[str, str]:
    """Write the figure to `path`; return its alternative text and its caption."""
    mpl.use("Agg")
    shown = [(c, e) for c in j.config.criteria if c.published is not None and (e := j.estimates[c.key])]
    height, line = 4.2, 0.65
    total = height + line * len(shown)
    above = ConstrainedLayoutEngine(rect=(0, 1 - height / total, 1, height / total))
    figure = Figure(figsize=(9.6, total), layout=above)
    alt, caption = module(j.config, "judge").draw(j.record["measured"], figure)
    said = []
    for at, (c, e) in enumerate(reversed(shown)):
        panel = figure.add_axes((0.03, (line * at + 0.28) / total, 0.7, 0.12 / total))
        said.append(plots.published(panel, c.text, (c.by, c.published or 0.0), e, number(e, brief=True)))
    if shown:
        alt = f"{alt} Below, numbers of papers: {'; '.join(reversed(said))}."
        caption = f"{caption} Below: ours with its interval, and that of a paper."
    disk.write_figure(path, figure, dpi=110)
    return alt, caption


def number(e: Estimate | None, *, brief: bool = False) -> str:
    """Return a number with its interval, and with n unless `brief`."""
    if e is None:
        return "not measured yet"
    value, low, high = (_digits(v) for v in (e.value, e.low, e.high))
    unit = e.unit if e.unit == "%" else f" {e.unit}" if e.unit else ""
    wide = f" ({low} to {high})" if low != value or high != value else ""
    return f"{value}{unit}{wide}" + ("" if brief or e.n == 1 else f", n = {e.n}")


def conditions(records: list[dict[str, Any]]) -> str:
    """Return the data, the versions, the machine and the time."""
    if not records:
        return "Nothing has been measured yet."
    first, minutes = records[0], sum(r["seconds"] for r in records) / 60
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    small = " **This is a smoke run: its numbers and verdicts mean nothing.**" if first["smoke"] else ""
    on = f"{first['hardware']['cpus']} {first['hardware']['machine']} CPUs"
    others = ", and MNIST and JapaneseVowels where a claim names them" if first["data"] == "digits" else ""
    return f"Data: {first['data']}{others}. {versions}; {on}; {minutes:.0f} minutes in all.{small}"


def _template(path: Path) -> jinja2.Template:
    return JINJA.from_string(path.read_text(encoding="utf-8"))


def _digits(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value and not 1e-3 <= size < 1e6:
        return f"{value:.1e}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"
