"""The report: a page with the table of all answers, and a page for each claim, in Markdown with figures.

Every number comes from a claim's record. The words of its page are a Jinja template, `page.md`, of two parts and a line
`---` between: the advice, and the text that is folded away. In it `{{ key }}` is the number of the criterion of that
name, `value.key` the plain number, `n.key` the number of values, `verdict.key` the verdict, and `first.key` the outcome
in the first run.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments import disk, figures
from experiments.claims._lib import checks, judged, plots, study
from experiments.claims._lib.config import ClaimConfig
from experiments.claims._lib.judged import Judged, judge, number
from experiments.tables import markdown, put

LIB = Path(__file__).parent
MARKS = ("<!-- claims -->", "<!-- /claims -->")
STYLE: dict[Any, Any] = figures.STYLE | {"axes.axisbelow": "line"}
SHOWN = 5  # rows of a page that are not folded away
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


def write(pages: Path, configs: list[ClaimConfig], records: list[dict[str, Any] | None]) -> None:
    """Write `index.md`, and a page and a figure for each claim, to `pages`."""
    found = [judge(c, r) if r else None for c, r in zip(configs, records, strict=True)]
    for j in found:
        if j:
            alt, caption = draw(j, pages / f"{j.config.name}.png")
            disk.write(pages / f"{j.config.name}.md", chapter(j, alt, caption))
    context: dict[str, Any] = {"table": table(found, configs, ""), "conditions": conditions([r for r in records if r])}
    context["checks"] = checks.stood([j for j in found if j])
    context["cases"] = sum(bool(case.scope) for c in configs for case in c.criteria)
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
            rows.append([f"[{c.number}. {c.claim}]({to}{c.name}.md)", j.headline(brief=brief), effect, c.where])
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
    own = judged.module(c, "judge")
    context["tables"] = own.tables(r["measured"]) if hasattr(own, "tables") else ""
    context["how"] = "; ".join(sorted({e.how for e in j.estimates.values() if e}))
    if r["smoke"]:
        context |= {"advice": "", "rest": ""}
    else:
        values: dict[str, Any] = {k: number(e, brief=True) for k, e in j.estimates.items()}
        values["value"] = SimpleNamespace(**{k: e and e.value for k, e in j.estimates.items()})
        values["n"] = SimpleNamespace(**{k: e and e.n for k, e in j.estimates.items()})
        values["first"] = r["first"]
        values["verdict"] = SimpleNamespace(**{x.key: p.verdict for x, p in zip(c.criteria, j.parts, strict=True)})
        words = _template(study.ROOT / "experiments" / "claims" / c.name / "page.md").render(values)
        context["advice"], context["rest"] = (part.strip() for part in words.split("\n---\n"))
    return _template(LIB / "chapter.md").render(context) + "\n"


def draw(j: Judged, path: Path) -> tuple[str, str]:
    """Write the figure to `path`; return its alternative text and its caption."""
    known = [(c, e) for c in j.config.criteria if (e := j.estimates[c.key])]
    shown = [(c, e, (c.by, c.published)) for c, e in known if c.published is not None]
    papers, below = bool(shown), "Below: ours with its interval, and a paper's."
    if not papers:  # the first row, beside its criterion
        bounds = [(c, e, c.at_least if c.at_most is None else c.at_most) for c, e in known[:1]]
        shown = [(c, e, ("criterion", bound)) for c, e, bound in bounds if bound is not None]
        below = "Below: the first row and its criterion; no published number is comparable."
    height, line = 4.2, 0.65
    total = height + line * len(shown)
    above = ConstrainedLayoutEngine(rect=(0, 1 - height / total, 1, height / total))
    said = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, total), layout=above)
        alt, caption = judged.module(j.config, "judge").draw(j.record["measured"], figure)
        for at, (c, e, beside) in enumerate(reversed(shown)):
            panel = figure.add_axes((0.03, (line * at + 0.28) / total, 0.7, 0.12 / total))
            said.append(plots.published(panel, c.text, beside, e, number(e, brief=True)))
        disk.write_figure(path, figure, dpi=110)
    if shown:
        alt, caption = f"{alt} Below: {'; '.join(reversed(said))}." if papers else alt, f"{caption} {below}"
    return alt, caption


def conditions(records: list[dict[str, Any]]) -> str:
    """Return the data, the versions, the machine and the time."""
    if not records:
        return "Nothing has been measured yet."
    first, minutes = records[0], sum(r["seconds"] for r in records) / 60
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    small = " **This is a smoke run: its numbers and verdicts mean nothing.**" if first["smoke"] else ""
    on = f"{first['hardware']['cpus']} {first['hardware']['machine']} CPUs"
    others = ", and MNIST and JapaneseVowels where a claim names them" if first["data"] == "digits" else ""
    return f"Data: {first['data']}{others}. {versions}; {on}; {minutes:.0f} minutes on one core in all.{small}"


def _template(path: Path) -> jinja2.Template:
    return JINJA.from_string(path.read_text(encoding="utf-8"))
