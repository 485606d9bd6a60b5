"""Every config runs from the command line, as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training.config import load

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.toml") if p.name != "base.toml")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_runs_and_leaves_its_files(config, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments", str(config), "--out", str(tmp_path / "run")]
    small = ["--steps", "20", "--log-every", "10", "--seeds", "2"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {10, 20}
    assert {line["arm"] for line in lines} == set(load(ROOT / config).settings.arms)
    assert (tmp_path / "run" / "figure.png").is_file()
    json.loads((tmp_path / "run" / "summary.json").read_text())
