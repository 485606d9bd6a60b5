"""The report: a table of all claims, a page for each, as Markdown with figures and as one HTML file.

Every number comes from the claims' JSON. What a page says in words stands in `pages/`; a name in braces there is the
number of the criterion of that name.
"""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from experiments.claims.config import ClaimConfig
from experiments.tables import markdown, put

PAGES = Path(__file__).parent / "pages"
MARKS = ("<!-- claims -->", "<!-- /claims -->")
STYLE = """body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{border:1px solid #bbb;padding:.3rem .6rem;text-align:left;vertical-align:top}
img{max-width:100%}code{background:#f2f2f2;padding:0 .2rem}h2{margin-top:3rem}"""


def write(folder: Path, configs: list[ClaimConfig]) -> None:
    """`RESULTS.md` and `RESULTS.html` in `folder`, from the JSON and the figures in its `results/`."""
    text = page(folder / "results", configs)
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    (folder / "RESULTS.html").write_text(html(text, folder), encoding="utf-8")


def page(results: Path, configs: list[ClaimConfig]) -> str:
    """The report as Markdown; a claim that has not been measured is said to be so."""
    records = read(results, configs)
    parts = [HEAD.format(conditions=conditions([r for r in records if r])), summary(records, configs, figures=True)]
    parts += [chapter(r, c) for r, c in zip(records, configs, strict=True) if r]
    return "\n\n".join(parts) + "\n"


def read(results: Path, configs: list[ClaimConfig]) -> list[dict[str, Any] | None]:
    """The record of each claim, or None."""
    paths = [results / f"{c.name}.json" for c in configs]
    return [json.loads(p.read_text(encoding="utf-8")) if p.is_file() else None for p in paths]


def summary(records: list[dict[str, Any] | None], configs: list[ClaimConfig], *, figures: bool) -> str:
    """One row for each claim, with its first number; `figures` adds where to find the rest."""
    head = ["", "claim", "verdict", "the first number, with its interval", "what it is, and its criterion"]
    rows = []
    for r, c in zip(records, configs, strict=True):
        if r is None:
            rows.append([str(c.number), c.claim, "not measured", "", ""])
        else:
            first = r["criteria"][0]
            rows.append([str(c.number), c.claim, f"**{r['verdict']}**", shown(first["estimate"]), criterion(first)])
        if figures:
            link = f"[figure](results/{c.name}.png)" if r else ""
            rows[-1] += [link, f"`{c.command}`"]
    return markdown([*head, "figure", "command"] if figures else head, rows)


def chapter(r: dict[str, Any], config: ClaimConfig) -> str:
    """The page of one claim."""
    path = PAGES / f"{config.name}.md"
    words = path.read_text(encoding="utf-8") if path.is_file() else "{results}"
    written_for = re.match(r"<!-- written for: (.*?) -->\n", words)
    note = ""
    if written_for:
        words = words[written_for.end() :]
        if written_for[1] != r["verdict"] or r["data"] != "digits" or r["smoke"]:
            note = f'\n\n*The words below were written for the digits and the verdict "{written_for[1]}".*'
    rows = [[c["text"], shown(c["estimate"]), bounds(c) or "reported only", _verdict(c)] for c in r["criteria"]]
    table = markdown(["measured", "number, interval, n", "criterion, set before the run", "verdict"], rows)
    results = f"![{config.name}](results/{config.name}.png)\n\n*{r['caption']}*\n\n{table}"
    numbers = {c["key"]: shown(c["estimate"], brief=True) for c in r["criteria"]} | {"results": results}
    # Not str.format: words may hold braces of their own.
    body = re.sub(r"\{(\w+)\}", lambda m: numbers[m[1]], words.strip())
    return f"## {config.number}. {config.claim}\n\n**Verdict: {r['verdict']}.** {config.question}{note}\n\n{body}"


def _verdict(c: dict[str, Any]) -> str:
    """The verdict on a part, and whether that on the claim depends on it."""
    return c["verdict"] + ("" if c["decides"] else " (does not decide)") if c["verdict"] else ""


def criterion(c: dict[str, Any]) -> str:
    """A criterion in words."""
    asked = bounds(c)
    return f"{c['text']}: {asked}" if asked else f"{c['text']}; reported only"


def bounds(c: dict[str, Any]) -> str:
    """What a number has to be."""
    least, most = (None if c[k] is None else f"{c[k]:g}" for k in ("at_least", "at_most"))
    if least and most:
        return f"from {least} to {most}"
    return f"at least {least}" if least else f"at most {most}" if most else ""


def shown(e: dict[str, Any], *, brief: bool = False) -> str:
    """A number with its interval, and with n and how it was made unless `brief`."""
    unit = f" {e['unit']}" if e["unit"] else ""
    text = f"{_number(e['value'])}{unit} ({_number(e['low'])} to {_number(e['high'])})"
    return text if brief else f"{text}; n = {e['n']}, {e['how']}"


def conditions(records: list[dict[str, Any]]) -> str:
    """On what, with what and for how long."""
    if not records:
        return "Nothing has been measured yet."
    first, minutes = records[0], sum(r["seconds"] for r in records) / 60
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    small = (
        " **This is a smoke run: it shows that everything runs, and its numbers mean nothing.**"
        if first["smoke"]
        else ""
    )
    on = f"{first['hardware']['cpus']} {first['hardware']['machine']} CPUs"
    return f"Data: {first['data']}. {versions}; {on}; {minutes:.0f} minutes in all.{small}"


def readme(page: Path, folder: Path, configs: list[ClaimConfig]) -> None:
    """Put the table into the README."""
    put(page, summary(read(folder / "results", configs), configs, figures=False), MARKS)


def html(text: str, folder: Path) -> str:
    """The report as one file that needs no other."""
    made = MarkdownIt("commonmark").enable("table").render(text)

    def embedded(m: re.Match[str]) -> str:
        data = base64.b64encode((folder / m[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    made = re.sub(r'src="(results/[^"]+\.png)"', embedded, made)
    # The table's links lead to the figures inside.
    made = re.sub(r'<a href="results/(\w+)\.png">', r'<a href="#\1">', made)
    made = re.sub(r'(<img src="[^"]+" alt="(\w+)")', r'\1 id="\2"', made)
    head = f'<meta charset="utf-8"><title>Twelve claims about batch normalization</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{made}</html>\n'


def _number(value: float | str) -> str:
    """Three digits; JSON has words for what is not finite."""
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"


HEAD = """# Twelve claims about batch normalization, measured

What is said of batch normalization, in the words in which it is usually said, and what came out when each sentence was
tested on real images. Each claim has a config in `configs/claims/` with its question, its source, and its criteria,
which were written before the run; where anything was changed after a first try, its page says so. `make claims` repeats
all of it.

How to read it: *supported* means that the whole 95% interval of every number that decides meets its criterion, *not
supported* that none of it does, *inconclusive* that an interval lies across, and *contested* that some parts hold and
others do not, or that the literature itself is divided and stays so here. Both arms of a comparison share their initial
weights, the order of the batches and the number of steps, and choose from the same learning rates by validation;
differences are taken seed by seed. A target that was not reached counts as later than all others (printed as ∞), and is
never left out.

{conditions}"""
