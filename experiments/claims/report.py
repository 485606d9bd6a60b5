"""The report: a table of all claims, a page for each, as Markdown with figures and as one HTML file.

Every number comes from the claims' JSON. What a page says in words stands in `pages/`. In it `{key}` is the number of
the criterion of that name, `{key.signs}` how many seeds are on which side, and `{?key supported: text}` is text that
stands there only if this is the verdict on that criterion, or on the claim of that name (or one of several, with bars
between them).
`pages/summary.md` is written in the same way over all claims: `{claim.key}`, `{?claim supported: text}`.
"""

import base64
import math
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from experiments import disk
from experiments.claims.config import ClaimConfig
from experiments.tables import markdown, put

PAGES = Path(__file__).parent / "pages"
REPORT = "experiments/RESULTS.md"  # where the README finds it
MARKS = ("<!-- claims -->", "<!-- /claims -->")
STYLE = """body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{border:1px solid #bbb;padding:.3rem .6rem;text-align:left;vertical-align:top}
img{max-width:100%}code{background:#f2f2f2;padding:0 .2rem}h2{margin-top:3rem}"""


def write(folder: Path, configs: list[ClaimConfig]) -> None:
    """`RESULTS.md` and `RESULTS.html` in `folder`, from the JSON and the figures in its `results/`."""
    text = page(folder / "results", configs)
    disk.write(folder / "RESULTS.md", text)
    disk.write(folder / "RESULTS.html", html(text, folder))


def page(results: Path, configs: list[ClaimConfig]) -> str:
    """The report as Markdown; a claim that has not been measured is said to be so."""
    records = read(results, configs)
    parts = [HEAD.format(conditions=conditions([r for r in records if r])), summary(records, configs, figures=True)]
    parts += [overview(records), GLOSSARY]
    parts += [chapter(r, c) for r, c in zip(records, configs, strict=True) if r]
    return "\n\n".join(parts) + "\n"


def read(results: Path, configs: list[ClaimConfig]) -> list[dict[str, Any] | None]:
    """The record of each claim, or None.

    Raises:
        DiskError: one is damaged.
    """
    paths = [results / f"{c.name}.json" for c in configs]
    remedy = "Delete it, and run the claim again."
    return [disk.read_checked(path, remedy) if path.is_file() else None for path in paths]


def summary(records: list[dict[str, Any] | None], configs: list[ClaimConfig], *, figures: bool) -> str:
    """One row for each claim, with a number of each side of its verdict; `figures` adds where to find the rest."""
    head = ["", "claim", "verdict", "numbers that decide, with their intervals", "what they are, and their criteria"]
    rows = []
    for r, c in zip(records, configs, strict=True):
        if r is None:
            rows.append([str(c.number), c.claim, "not measured", "", ""])
        else:
            link = f"[{c.number}]({'' if figures else REPORT}#claim-{c.number})"
            found = [(f"{shown(v['estimate'], brief=True)}; n = {v['estimate']['n']}", criterion(v)) for v in sides(r)]
            cells = zip(*found, strict=True)
            rows.append([link, c.claim, f"**{said(r)}**", *("<br>".join(cell) for cell in cells)])
        if figures:
            link = f"[figure](results/{c.name}.png)" if r else ""
            rows[-1] += [link, f"`{c.command}`"]
    return markdown([*head, "figure", "command"] if figures else head, rows)


def said(r: dict[str, Any]) -> str:
    """The verdict; of a smoke run, that it is none."""
    return f"{r['verdict']} (smoke run: means nothing)" if r["smoke"] else r["verdict"]


def sides(r: dict[str, Any]) -> list[dict[str, Any]]:
    """The first criterion that decides, and one with another verdict where they differ: a clear one if there is."""
    deciding = [c for c in r["criteria"] if c["decides"] and c["verdict"]] or r["criteria"][:1]
    other = [c for c in deciding if c["verdict"] != deciding[0]["verdict"]]
    return [deciding[0], *sorted(other, key=lambda c: c["verdict"] == "inconclusive")[:1]]


def overview(records: list[dict[str, Any] | None]) -> str:
    """What follows from all verdicts for whoever builds a network; what was not measured in earnest says nothing."""
    values: dict[str, str] = {}
    verdicts: dict[str, str] = {}
    for r in records:
        if r and not r["smoke"]:
            verdicts[r["name"]] = r["verdict"]
            values |= {f"{r['name']}.{key}": text for key, text in _values(r).items()}
            verdicts |= {f"{r['name']}.{c['key']}": c["verdict"] for c in r["criteria"] if c["verdict"]}
    text, remark = (PAGES / "summary.md").read_text(encoding="utf-8").rsplit("\n\n", 1)
    filled = [_filled(line, values, verdicts) for line in text.split("\n- ")]
    shown = "\n- ".join([filled[0].strip() + "\n", *(" ".join(line.split()) for line in filled[1:] if line.strip())])
    return f"{shown}\n\n{remark.strip()}"


def _values(r: dict[str, Any]) -> dict[str, str]:
    """What may stand in braces on the page of a claim."""
    brief = {c["key"]: shown(c["estimate"], brief=True) for c in r["criteria"]}
    return brief | {f"{c['key']}.signs": signs(c["estimate"]) for c in r["criteria"] if c["estimate"]["signs"]}


def _filled(words: str, values: dict[str, str], verdicts: dict[str, str]) -> str:
    """`words` with numbers, and with the sentences whose condition holds; nothing for a name that is not known."""
    # Not str.format: words may hold braces of their own.
    words = re.sub(r"\{([\w.]+)\}", lambda m: values.get(m[1], ""), words)

    def kept(m: re.Match[str]) -> str:
        return m[3] if verdicts.get(m[1]) in [" ".join(v.split()) for v in m[2].split("|")] else ""

    return re.sub(r"\{\?([\w.]+)\s([a-z |\n]+):\s([^{}]*)\}", kept, words)


def chapter(r: dict[str, Any], config: ClaimConfig) -> str:
    """The page of one claim."""
    path = PAGES / f"{config.name}.md"
    words = path.read_text(encoding="utf-8") if path.is_file() else "{results}"
    written_for = re.match(r"<!-- written for: (.*?) -->\n", words)
    note = ""
    if written_for:
        words = words[written_for.end() :]
        if r["smoke"]:
            words = words.split("### What came out")[0] + "### What came out\n\n{results}"
        elif written_for[1] != r["verdict"] or r["data"] != "digits":
            note = f'\n\n*The words below were written for the digits and the verdict "{written_for[1]}".*'
    rows = [[c["text"], shown(c["estimate"]), bounds(c) or "reported only", _verdict(c)] for c in r["criteria"]]
    table = markdown(["measured", "number, interval, n", "criterion, set before the run", "verdict"], rows)
    results = f"![{config.name}](results/{config.name}.png)\n\n*{r['caption']}*\n\n{table}"
    if r["tables"]:
        results += f"\n\n{r['tables']}"
    verdicts = {c["key"]: c["verdict"] for c in r["criteria"] if c["verdict"]} | {r["name"]: r["verdict"]}
    body = _filled(words.strip(), _values(r) | {"results": results}, verdicts)
    expected = f"*What we expected, written before the run:* {' '.join(r['expected'].split())}"
    head = f'<a id="claim-{config.number}"></a>\n\n## {config.number}. {config.claim}'
    return f"{head}\n\n**Verdict: {said(r)}.** {config.question}\n\n{expected}{note}\n\n{body}"


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
    """A number with its interval, and unless `brief` with n, how it was made, and what the pairs of seeds say."""
    value, low, high = (_number(e[k]) for k in ("value", "low", "high"))
    text = value + (e["unit"] if e["unit"] == "%" else f" {e['unit']}" if e["unit"] else "")
    wide = low != value or high != value
    text += f" ({low} to {high})" if wide else ""
    if brief:
        return text
    text += f"; n = {e['n']}, {e['how']}" + ("" if wide or "interval" not in e["how"] else " without width")
    if e["signs"]:
        text += f"; quartiles {_number(e['quartiles'][0])} to {_number(e['quartiles'][1])}; {signs(e)}"
    return text


def signs(e: dict[str, Any]) -> str:
    """How many pairs are above the number that favours nobody, how many below, and how likely that is by chance."""
    above, below, p = e["signs"]
    return f"{above} of {e['n']} above {e['against']:g}, {below} below, sign test p = {float(p):.2g}"


def conditions(records: list[dict[str, Any]]) -> str:
    """On what, with what and for how long."""
    if not records:
        return "Nothing has been measured yet."
    first, minutes = records[0], sum(r["seconds"] for r in records) / 60
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    small = (
        " **This is a smoke run: it shows that everything runs, and its numbers and verdicts mean nothing.**"
        if any(r["smoke"] for r in records)
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
which were written before the run; where anything was changed after a first try, or is smaller than planned, its page
says so. `make claims` repeats all of it.

How to read it. A number that decides is *supported* if all of its interval meets its criterion, *not supported* if
none of it does, and *inconclusive* if its interval lies across. The interval is a 95% bootstrap interval over seeds,
or, where a statement is exact, the smallest and the largest value of all. A claim is *supported* or *not supported*
if all its numbers that decide are, *contested* if some are and others are not, or if the literature is divided and
our numbers do not all agree, and else *inconclusive*: also if some are supported and others inconclusive. Both arms
of a comparison share their initial weights, the order of the batches and the number of steps, and choose from the
same learning rates by validation; differences and ratios are taken seed by seed. A target that was not reached counts
as later than all others (printed as ∞), and is never left out. Where no interval is printed it has no width. Less
than a thousandth of a percentage point of accuracy, far below one image, counts as nothing. The sign test says how
likely it is that as many seeds are on one side if both sides were equally likely; it counts seeds and not sizes, so
that with 8 seeds it cannot be below 1/128, and it may disagree with the interval.

{conditions}"""

GLOSSARY = """## Words

- **Arm**: one side of a comparison, such as the network with batch normalization.
- **Seed**: the number that all chance of a run comes from, its initial weights and the order of its images.
- **pp**: percentage points; from 90% to 92% are 2 pp.
- **Step**: one update of the weights, from one *batch* of images.
- **MLP**: a network of layers in which each unit sees all units of the layer before. **CNN**: one in which units see
  neighbouring pixels. **LSTM**: one that reads a sequence piece by piece and keeps a memory.
- **He weights**: random initial weights of the size (He et al. 2015) that keeps signals equally large from one ReLU
  layer to the next.
- **Epsilon**: the small number, 0.00001 here, that is added to a variance before its root is divided by.
- **Gradient**: how the loss changes with each weight; a step moves the weights against it, by the *learning rate*.
- **Running average**: what a layer has seen of means and variances in training, for use in evaluation."""
