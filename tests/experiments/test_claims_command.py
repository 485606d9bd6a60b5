"""The command of the claims: it goes on where it was interrupted, and refuses wrong arguments and configs by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments.claims._lib import command, config, intervals, judged
from experiments.claims._lib.verdict import Criterion
from experiments.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "experiments" / "claims"
CONFIGS = config.load_all(CLAIMS)


class Made:
    """A claim that is measured in two parts; the first run is interrupted between them."""

    def __init__(self, interrupt):
        self.interrupt, self.measured, self.stops = interrupt, [], [True, False]

    def measure(self, here, settings):
        def part(name):
            self.measured.append(name)
            return {"values": [1.0, 2.0, 1.5]}

        first = here.part("one", {}, lambda: part("one"))
        self.interrupt.requested = self.stops.pop(0)
        return {"first": first, "second": here.part("two", {}, lambda: part("two"))}

    def estimates(self, found):
        return {"number": intervals.mean(found["second"]["values"])}

    def draw(self, found, figure):
        figure.subplots().plot(found["first"]["values"])
        return "a line", "a caption"


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C between two parts: the first is kept, no report is written, and the second run measures the rest only."""
    interrupt = Interrupt()
    made = Made(interrupt)
    claim = dataclasses.replace(CONFIGS[0], criteria=(Criterion("number", "a number", at_least=1.0, scope="numbers"),))
    monkeypatch.setattr(command, "load_all", lambda _: [claim])
    monkeypatch.setattr(judged, "module", lambda *_: made)
    given = ["--smoke", "--out", str(tmp_path)]
    assert command.main(given, interrupt) == 130
    assert not (tmp_path / "index.md").exists()
    assert "goes on from there" in capsys.readouterr().out.replace("\n", " ")
    interrupt.requested = False
    assert command.main(given, interrupt) == 0
    assert made.measured == ["one", "two"]
    record = json.loads((tmp_path / claim.name / "result.json").read_text())
    assert record["first"]["number"]["value"] == 1.5
    assert record["asked"] == {"one": {}, "two": {}}
    assert (tmp_path / f"{claim.name}.png").is_file()
    assert "![a line]" in (tmp_path / f"{claim.name}.md").read_text()


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


def test_missing_data_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["--only", "recurrent", "--out", str(tmp_path / "run")], Interrupt()) == 2
    assert "`pip install --no-deps aeon`" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("where = ", "wher = "), "wher"),
        (lambda text: text.replace("number = 3", "number = 0"), "number"),
        (lambda text: text + '\n[[criteria]]\nkey = "step_cost"\ntext = "again"\n', "twice"),
        (lambda text: text + '\n[[criteria]]\nkey = "other"\n', "text"),
        (lambda text: text + '\n[[criteria]]\nkey = "other"\ntext = "words"\nat_lest = 2.0\n', "at_lest"),
        (lambda text: text.replace("seeds = 6", "seeds = 0"), "seeds"),
        (lambda text: re.sub(r"\[\[criteria\]\](.|\n)*", "", text), "criteria"),
    ],
)
def test_configs_are_refused_by_name(change, words, tmp_path):
    own = CLAIMS / "faster" / "config.toml"
    folder = tmp_path / "faster"
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text(change(own.read_text().replace("../../../configs/base.toml", str(ROOT / "configs" / "base.toml"))))
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        config.load(path)
    assert str(path) in str(caught.value)
