"""The machinery of the claims: that arms are paired, intervals right, parts resumed, the report made of the records.

Nothing here says that a claim holds or does not.
"""

import ast
import base64
import dataclasses
import itertools
import json
import math
import re
import struct
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import disk
from experiments.claims import command, config, intervals, report, study, verdict
from experiments.claims.intervals import Estimate
from experiments.claims.measured import learning_rates
from experiments.claims.verdict import Criterion
from experiments.interrupt import Interrupt
from experiments.training import data, layers
from experiments.training.models import gaussian, mlp

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

ROOT = Path(__file__).parents[2]
CONFIGS = config.load_all(ROOT / "configs" / "claims")
PUBLISHED = ROOT / "experiments"
NUMBERS = st.lists(st.floats(-100, 100), min_size=3, max_size=20)


# Intervals


@settings(max_examples=20, deadline=None)
@given(NUMBERS)
def test_the_interval_lies_around_the_statistic_and_inside_the_values(values):
    for estimate, value in ((intervals.mean(values), np.mean(values)), (intervals.median(values), np.median(values))):
        assert estimate.value == pytest.approx(value, abs=1e-9)  # a sum of 20 float64 below 100
        assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9
        assert estimate.n == len(values)
    assert intervals.mean(values) == intervals.mean(values)  # seeded


def test_the_interval_of_the_mean_is_that_of_all_resamples():
    """Against the exact bootstrap distribution: all 3^3 resamples of three values."""
    values = [0.0, 1.0, 10.0]
    every = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=3)])
    estimate = intervals.mean(values)
    assert estimate.low in every
    assert estimate.high in every
    assert estimate.low == pytest.approx(np.quantile(every, 0.025, method="inverted_cdf"))
    assert estimate.high == pytest.approx(np.quantile(every, 0.975, method="inverted_cdf"))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 400 samples of 30: binomial, three standard deviations below 0.95 is 0.917; percentile intervals of 30 values
    fall short by about 0.015 themselves."""
    rng = np.random.default_rng(0)
    covered = [e.low <= 0 <= e.high for e in (intervals.mean(rng.standard_normal(30)) for _ in range(400))]
    assert 0.89 < np.mean(covered) < 0.98


def test_groups_are_drawn_before_their_members():
    """Where groups differ and members do not, the interval is that of the groups alone: wider than of independents."""
    values = np.repeat([[0.0], [1.0], [2.0], [3.0]], 50, axis=1)
    grouped, single = intervals.mean(values), intervals.mean(values.ravel())
    assert grouped.high - grouped.low > 3 * (single.high - single.low)


def test_what_was_never_reached_is_larger_than_all_others():
    steps = intervals.first_step([10, 20, 30], [[0.1, 0.5, 0.9], [0.6, 0.2, 0.7], [0.1, 0.2, 0.3]], 0.5)
    assert steps == [20.0, 10.0, math.inf]
    assert intervals.first_step([10, 20], [[0.1, 0.5], [0.1, 0.5]], [0.1, 0.6]) == [10.0, math.inf]
    assert intervals.ratio([20, math.inf, 10, math.inf], [10, 10, math.inf, math.inf]) == [2.0, math.inf, 0.0, 1.0]
    assert intervals.median([1.0, math.inf, math.inf]).value == math.inf
    assert intervals.median([1.0, 2.0, 3.0, math.inf, math.inf]).value == 3.0
    assert intervals.median([1.0, 3.0, math.inf, math.inf]).value == math.inf
    with pytest.raises(ValueError, match="numbers"):
        intervals.mean([1.0, math.nan])


@pytest.mark.parametrize(("ups", "downs", "p"), [(8, 0, 2 / 256), (7, 1, 18 / 256), (0, 0, 1.0), (4, 4, 1.0)])
def test_sign_test(ups, downs, p):
    assert intervals.sign_test([1.0] * ups + [-1.0] * downs + [0.0]) == pytest.approx(p)


def test_what_pairs_say():
    """Quartiles, and how many are above 1 and below; infinity is above."""
    found = intervals.median([2.0, 0.5, math.inf, 4.0, 1.0], against=1.0)
    assert found.signs == (3, 1, pytest.approx(0.625))  # 5 of the 8 ways of 3 signs of 4 or more on one side
    assert found.quartiles == (1.0, 4.0)
    assert intervals.mean([1.0, 2.0]).signs is None
    assert intervals.share([2.0, 0.5, math.inf, 4.0], 1.0)[:4] == (0.75, 0.75, 0.75, 4)


def test_rounding_is_no_difference():
    """Accuracies are kept with six digits: what these leave of equal counts is zero, and one image is not."""
    dust = intervals.mean([3e-5, -1e-5, 0.0, 0.05], "pp", against=0.0)
    assert dust.signs[:2] == (1, 0)
    assert dust.low == 0.0
    assert intervals.mean([27.7778 - 27.7777, -1e-5], "pp").value == 0.0
    assert intervals.mean([3e-5, 1e-5]).value == 2e-5  # of other numbers every digit counts


# Verdicts

KEPT = {"value": 1.0, "n": 8}


@pytest.mark.parametrize(
    ("low", "high", "least", "most", "expected"),
    [
        (2.0, 3.0, 2.0, None, "supported"),
        (1.9, 3.0, 2.0, None, "inconclusive"),
        (0.0, 1.9, 2.0, None, "not supported"),
        (0.0, 1.0, None, 1.0, "supported"),
        (1.1, math.inf, None, 1.0, "not supported"),
        (0.5, 0.6, 0.4, 0.7, "supported"),
        (0.3, 0.6, 0.4, 0.7, "inconclusive"),
        (0.8, 0.9, 0.4, 0.7, "not supported"),
        (2.0, math.inf, 2.0, None, "supported"),
        (0.0, 9.0, None, None, None),
    ],
)
def test_a_part_is_judged_by_its_whole_interval(low, high, least, most, expected):
    criterion = Criterion("k", "text", at_least=least, at_most=most)
    assert verdict.judged(criterion, Estimate(1.0, low, high, 8)) == expected


YES, NO, OPEN = "supported", "not supported", "inconclusive"


@pytest.mark.parametrize(
    ("parts", "contested", "expected"),
    [
        ([YES, YES], False, YES),
        ([NO, NO], False, NO),
        ([YES, NO], False, "contested"),
        ([YES, OPEN], False, OPEN),
        ([OPEN], False, OPEN),
        ([YES, NO, OPEN], False, "contested"),
        ([YES, YES], True, YES),
        ([YES, OPEN], True, "contested"),
        ([OPEN], True, "contested"),
        ([None], True, "contested"),
        ([None], False, OPEN),
    ],
)
def test_a_claim_is_what_its_deciding_parts_agree_on(parts, contested, expected):
    criteria = [Criterion(str(i), "text") for i in range(len(parts))]
    assert verdict.overall(criteria, parts, contested=contested) == expected
    reported = [Criterion("other", "text", decides=False)]
    assert verdict.overall(criteria + reported, [*parts, NO], contested=contested) == expected


# Pairing, choice and parts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of two seeds, and settings of four steps."""
    here = study.Study(data.digits(), smoke=False, folder=tmp_path_factory.mktemp("parts"))
    changes = {"widths": (4,), "seeds": 2, "steps": 4, "log_every": 2, "learning_rates": (1e-30, 0.1)}
    return here, here.settings(study.BASE, **changes)


def network(norm, seen=None):
    layer = layers.plain(jnp.tanh) if norm == "none" else layers.batch_norm(activation=jnp.tanh)

    def apply(params, state, x, run):
        if seen is not None and run.train:
            jax.debug.callback(lambda v: seen.append(np.array(v)), x)
        return layer.apply(params, state, x, run)

    return mlp([layers.Layer(layer.init, apply)], (4,), gaussian(0.3, he=False))


@pytest.mark.slow
def test_arms_share_weights_and_batches(tiny):
    """What enters the hidden layer is the batch times the first weights: with a learning rate that moves nothing it
    is the same in both arms at all steps, and differs between seeds and between steps."""
    here, s = tiny
    s = dataclasses.replace(s, learning_rates=(1e-30,))
    entered = {}
    for norm in ("none", "batch"):
        seen = []
        here.fit(s, network(norm, seen))
        jax.effects_barrier()
        entered[norm] = {v.tobytes() for v in seen}
        assert len(entered[norm]) == s.seeds * s.steps
    assert entered["none"] == entered["batch"]


def test_a_rate_is_chosen_by_validation_and_tested_at_its_best_step():
    flat = np.zeros((2, 3, 2))
    accuracy, loss = flat.copy(), flat.copy()
    accuracy[:, 1, -1] = accuracy[:, 2, -1] = 0.9
    loss[:, 1], loss[:, 2] = 1.0, 0.5
    log = study.Log(np.array([1, 2]), flat, loss, accuracy, flat)
    assert study.chosen(log) == 2  # the lower loss of two that are equally accurate
    loss[:, 2] = math.nan
    assert study.chosen(log) == 1
    accuracy[0, 1], accuracy[1, 1] = [0.95, 0.9], [0.9, 0.95]
    tests = flat.copy()
    tests[:, 1] = [[0.1, 0.2], [0.3, 0.4]]
    assert study.tested(log._replace(test_accuracy=tests), 1).tolist() == [0.1, 0.4]


def test_a_finished_part_is_not_measured_again(tiny):
    here, _ = tiny
    calls = []

    def measure():
        calls.append(1)
        return {"number": np.float32(0.1), "none": None, "curve": np.arange(3), "never": math.inf, "name": "nan-like"}

    first = here.part("part", {"steps": 1}, measure)
    assert first == {"number": 0.1, "none": None, "curve": [0, 1, 2], "never": math.inf, "name": "nan-like"}
    assert here.part("part", {"steps": 1}, measure) == first
    assert len(calls) == 1
    others = [
        (here, {"steps": 2}),
        (dataclasses.replace(here, smoke=True), {"steps": 1}),
        (dataclasses.replace(here, source="other"), {"steps": 1}),
        (dataclasses.replace(here, data=data.digits(1)), {"steps": 1}),
    ]
    for number, (other, asked) in enumerate(others):
        other.part("part", asked, measure)
        assert len(calls) == number + 2  # anything else that it depends on makes it another part


@pytest.mark.parametrize("name", [c.name for c in CONFIGS])
def test_a_part_depends_on_all_that_measures_it(name):
    """Whatever a measurement imports, at any remove, is in the hash that its parts are kept under."""
    hashed, found = set(study.source_files(name)), set()
    todo = [ROOT / "experiments" / "claims" / "measured" / f"{name}.py"]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("experiments"):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    there = ROOT / module.replace(".", "/")
                    todo += [p for p in (there.with_suffix(".py"), there / "__init__.py") if p.is_file()]
    assert len(found) > 10
    assert found <= hashed
    assert ROOT / "jaxbn" / "_core" / "batch_norm.py" in hashed


def test_what_a_part_was_asked():
    """Of settings what differs from the config's; all else in full."""
    given = CONFIGS[0].settings
    changed = dataclasses.replace(given, steps=7)
    network = learning_rates.Network(rates=slice(1, 2))
    asked = {"part": {"settings": changed, "network": network, "rates": (1.0, 2)}}
    assert study.differing(asked, given) == {
        "part": {
            "settings": {"steps": 7},
            "network": {"depth": 10, "rates": "slice(1, 2, None)", "batch_size": None, "head_fixed": False},
            "rates": [1.0, 2],
        }
    }


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C between two parts: the first is kept, no report is written, and the second run measures the rest only."""
    measured, stops, interrupt = [], [True, False], Interrupt()

    class Module:
        @staticmethod
        def measure(here, settings):
            def part(name):
                measured.append(name)
                return {"values": [1.0, 2.0]}

            first = here.part("one", {}, lambda: part("one"))
            interrupt.requested = stops.pop(0)
            return {"first": first, "second": here.part("two", {}, lambda: part("two"))}

        @staticmethod
        def estimates(found):
            return {"number": intervals.mean(found["second"]["values"])}

        @staticmethod
        def draw(found, figure):
            figure.subplots().plot(found["first"]["values"])
            return "a caption"

    claim = dataclasses.replace(CONFIGS[0], name="made_up", criteria=(Criterion("number", "a number", at_least=1.0),))
    monkeypatch.setattr(command, "module", lambda kind, claim: Module)
    monkeypatch.setattr(study, "source_hash", lambda name: name)
    here = study.Study(data.digits(), smoke=True, folder=tmp_path / "parts")
    given = ([claim], [claim], here, "digits", tmp_path, False, interrupt)
    assert command.run(*given) == 130
    assert not (tmp_path / "RESULTS.md").exists()
    assert "goes on from there" in capsys.readouterr().out.replace("\n", " ")
    interrupt.requested = False
    assert command.run(*given) == 0
    assert measured == ["one", "two"]
    record = json.loads((tmp_path / "results" / f"{claim.name}.json").read_text())
    assert record["verdict"] == "supported"
    assert record["criteria"][0]["estimate"]["value"] == 1.5
    assert record["source"] == claim.source  # of the claim, and not of the program
    assert record["program"] == claim.name
    assert record["asked"] == {"one": {}, "two": {}}
    page = (tmp_path / "RESULTS.html").read_text()
    shown = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert shown == (tmp_path / "results" / f"{claim.name}.png").read_bytes()
    assert 'src="results' not in page


# Other images


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with files in MNIST's format: 600 and 200 images that are noise around their digit's own."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    own = rng.integers(0, 256, (10, 28 * 28))
    for name, count in (("train", 600), ("t10k", 200)):
        labels = np.arange(count) % 10
        images = (0.8 * own[labels] + rng.integers(0, 50, (count, 28 * 28))).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        head = struct.pack(">2i", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder with files in CIFAR-10's binary format: five of 60 images and one of 100, noise around their class."""
    folder, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    own = rng.integers(0, 256, (10, 3 * 32 * 32))
    for name, count in (*((f"data_batch_{n}", 60) for n in range(1, 6)), ("test_batch", 100)):
        labels = np.arange(count) % 10
        images = 0.8 * own[labels] + rng.integers(0, 50, (count, 3 * 32 * 32))
        rows = np.concatenate([labels[:, None], images], 1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


def test_files_become_three_parts(mnist):
    """A fifth of small files to validate and to test with, in the classes' proportions; nothing in two parts."""
    name, images = command.source(command.Command(mnist=mnist))
    assert name == "mnist"
    assert [len(part.labels) for part in images] == [480, 120, 40]
    for part in images:
        assert np.array_equal(np.bincount(part.labels), np.full(10, len(part.labels) / 10))
        assert part.images.shape[1] == 784
        assert part.images.dtype == np.float32
        assert 0 <= part.images.min() < part.images.max() <= 1
    rows = [{row.tobytes() for row in part.images} for part in images]
    assert not rows[0] & rows[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [(c.name, "mnist") for c in CONFIGS] + [("normalizes", "cifar"), ("small_batches", "cifar")]
)
def test_a_claim_is_measured_on_other_images(name, kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    given = ["--only", name, "--smoke", f"--{kind}", str(folder), "--out", str(tmp_path)]
    assert command.main(given, Interrupt()) == 0
    record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert (record["data"], record["smoke"]) == (kind, True)
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"Data: {kind}" in page
    assert "its numbers and verdicts mean nothing" in page


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing"], "must name claims"),
        (["--smoke", "--publish"], "full run"),
        (["--mnist", "a", "--cifar", "b"], "exclude each other"),
        (["--mnist", "no/such/folder"], "no/such/folder"),
    ],
)
def test_the_command_refuses(arguments, words, capsys):
    assert command.main(arguments, Interrupt()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("minutes = ", "minuts = "), "minuts"),
        (lambda text: text.replace("number = 3", "number = 0"), "number"),
        (lambda text: text + '\n[[criteria]]\nkey = "same_rate"\ntext = "again"\n', "twice"),
        (lambda text: text + '\n[[criteria]]\nkey = "other"\n', "text"),
        (lambda text: text + '\n[[criteria]]\nkey = "other"\ntext = "words"\nat_lest = 2.0\n', "at_lest"),
        (lambda text: text.replace("seeds = 8", "seeds = 0"), "seeds"),
        (lambda text: re.sub(r"\[\[criteria\]\](.|\n)*", "", text), "criteria"),
    ],
)
def test_configs_are_refused_by_name(change, words, tmp_path):
    (tmp_path / "base.toml").write_text((ROOT / "configs" / "base.toml").read_text())
    folder = tmp_path / "claims"
    folder.mkdir()
    path = folder / "faster.toml"
    path.write_text(change((ROOT / "configs" / "claims" / "faster.toml").read_text()))
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        config.load(path)
    assert "faster.toml" in str(caught.value)


# What is published


def test_all_twelve_are_published():
    assert [c.number for c in CONFIGS] == list(range(1, 13))
    for c in CONFIGS:
        assert c.command == f"python -m experiments.claims --only {c.name}"
        record = json.loads((PUBLISHED / "results" / f"{c.name}.json").read_text())
        assert record["data"] == "digits"
        assert record["smoke"] is False
        words = ("number", "claim", "question", "source", "command", "expected", "cost")
        assert [record[w] for w in words] == [getattr(c, w) for w in words]


@pytest.mark.parametrize("name", [c.name for c in CONFIGS])
def test_the_published_verdict_follows_from_its_numbers(name):
    """Estimates are made again from the numbers of the seeds, and the verdicts from the criteria of the config."""
    claim = next(c for c in CONFIGS if c.name == name)
    record = json.loads((PUBLISHED / "results" / f"{name}.json").read_text())
    made = command.judged(claim, study.numbers(record["measured"]))
    assert made["verdict"] == record["verdict"]
    assert made["criteria"] == record["criteria"]
    assert made["tables"] == record["tables"]


def test_the_report_and_the_readme_are_made_of_the_records():
    """A number that was changed by hand anywhere would differ."""
    assert (PUBLISHED / "RESULTS.md").read_text(encoding="utf-8") == report.page(PUBLISHED / "results", CONFIGS)
    html = report.html((PUBLISHED / "RESULTS.md").read_text(encoding="utf-8"), PUBLISHED)
    assert (PUBLISHED / "RESULTS.html").read_text(encoding="utf-8") == html
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.split(report.MARKS[0])[1].split(report.MARKS[1])[0].strip()
    made = report.summary(report.read(PUBLISHED / "results", CONFIGS), CONFIGS, figures=False)
    assert table.startswith(made)


@pytest.mark.parametrize("name", [c.name for c in CONFIGS])
def test_pages_hold_no_typed_result(name):
    """Results stand in braces, where the program fills them in; other numbers are of what was done."""
    text = (report.PAGES / f"{name}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", text, re.M)
    wanted = ["What is claimed", "What we did", "What came out", "Why it may differ from the paper"]
    assert headings == [*wanted, "What it means for you"]
    claim = next(c for c in CONFIGS if c.name == name)
    keys = {c.key for c in claim.criteria}
    paired = {c["key"] for c in record_of(name)["criteria"] if c["estimate"]["signs"]}
    assert set(re.findall(r"\{([\w.]+)\}", text)) <= keys | {"results"} | {f"{key}.signs" for key in paired}
    judged = {c.key for c in claim.criteria if not (c.at_least is None and c.at_most is None)}
    assert {key for key, *_ in conditions(text)} <= judged | {name}
    assert "{results}" in text
    before, after = text.split("### What came out")
    known = " ".join([before, claim.claim, claim.cost, claim.expected, *(c.text for c in claim.criteria)])
    came_out, rest = after.split("### Why", 1)
    # After the results also code, names of networks, and references may hold numbers.
    rest = re.sub(r"`[^`]*`|\w+-\d+|claim \d+", "", rest)
    for number in re.findall(r"\d[\d,.]*\d|\d", re.sub(r"\{[\w.]+\}", "", came_out + rest)):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", known), number


def record_of(name):
    return disk.read_checked(PUBLISHED / "results" / f"{name}.json", "")


def conditions(text):
    """`(name, verdicts, text)` of all that stands on a page under a condition; none is malformed."""
    found = re.findall(r"\{\?([\w.]+)\s([a-z |\n]+):\s((?:[^{}]|\{[\w.]+\})*)\}", text)
    assert len(found) == text.count("{?")
    for _, verdicts, _ in found:
        assert {" ".join(v.split()) for v in verdicts.split("|")} <= set(typing.get_args(verdict.Verdict))
    return found


def test_the_summary_speaks_of_what_there_is():
    text = (report.PAGES / "summary.md").read_text(encoding="utf-8")
    criteria = {f"{c.name}.{v.key}" for c in CONFIGS for v in c.criteria}
    assert {key for key, *_ in conditions(text)} <= criteria | {c.name for c in CONFIGS}
    assert set(re.findall(r"\{([\w.]+)\}", text)) <= criteria
    assert {int(n) for n in re.findall(r"\(#claim-(\d+)\)", text)} == {c.number for c in CONFIGS}
    assert not re.search(r"\d", re.sub(r"\[claim\s+\d+\]\(#claim-\d+\)|over 2 the", "", text))


def test_sentences_stand_under_their_verdict():
    words = "a {key}{?key not\nsupported|inconclusive: : no, {other.signs}}{?key supported: : yes}."
    values = {"key": "1 (0 to 2)", "other.signs": "1 of 2"}
    assert report._filled(words, values, {"key": "supported"}) == "a 1 (0 to 2): yes."
    assert report._filled(words, values, {"key": "not supported"}) == "a 1 (0 to 2): no, 1 of 2."
    assert report._filled(words, values, {}) == "a 1 (0 to 2)."


def test_a_table_row_shows_both_sides():
    made = [{"key": str(i), "decides": d, "verdict": v} for i, (d, v) in enumerate(
        [(True, YES), (False, NO), (True, OPEN), (True, NO)]
    )]  # fmt: skip
    assert [c["key"] for c in report.sides({"criteria": made})] == ["0", "3"]
    assert [c["key"] for c in report.sides({"criteria": made[:3]})] == ["0", "2"]
    assert [c["key"] for c in report.sides({"criteria": made[:2]})] == ["0"]


def test_numbers_in_print():
    pairs = intervals.mean([1.0, 2.0, -1.0, 0.0, 4.0], "pp", against=0.0)._asdict()
    assert report.shown(pairs).endswith("; quartiles 0 to 2; 3 of 5 above 0, 1 below, sign test p = 0.62")
    assert report.shown(intervals.exact(13824.0, "counted")._asdict()) == "13824; n = 1, counted"
    assert report.shown(intervals.median([5.0, 5.0])._asdict()).endswith("95% bootstrap interval without width")
    assert report.shown(intervals.mean([50.0, 51.0], "%")._asdict(), brief=True) == "50.5% (50 to 51)"


def test_judged_again_from_what_is_kept(tmp_path, capsys):
    """Verdicts follow a criterion that has changed, numbers do not change, and the report is of both."""
    assert command.again(CONFIGS, CONFIGS, tmp_path, False) == 2
    assert "needs measured claims" in capsys.readouterr().err
    claim = next(c for c in CONFIGS if c.name == "initialization")
    (tmp_path / "results").mkdir()
    old = record_of(claim.name)
    disk.write_checked(tmp_path / "results" / f"{claim.name}.json", old)
    first = dataclasses.replace(claim.criteria[0], at_least=1000.0)
    claim = dataclasses.replace(claim, criteria=(first, *claim.criteria[1:]))
    assert command.again([claim], [claim], tmp_path, False) == 0
    new = json.loads((tmp_path / "results" / f"{claim.name}.json").read_text())
    assert (old["verdict"], new["verdict"]) == ("supported", "not supported")
    assert new["measured"] == old["measured"]
    assert "**Verdict: not supported.**" in (tmp_path / "RESULTS.md").read_text()
