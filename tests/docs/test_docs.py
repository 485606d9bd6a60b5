"""The documentation: every block of Python runs as a reader would paste it, and tables say what signatures say."""

import fnmatch
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_doctests import public_names

import jaxbn

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
}
# Pages that show another library need it.
NEEDS = {"pytorch": "torch", "haiku": "haiku", "keras": "keras", "equinox": "equinox"}


# A block of Python, and maybe the text that it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Return the blocks of Python on a page, in order."""
    return [code for code, _ in BLOCK.findall(PAGES[page])]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
@pytest.mark.usefixtures("ordinary_promotion")
def test_every_block_runs_in_order(page, monkeypatch, capsys):
    """Text directly after a block is what it prints, up to the `...` in each line."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    if Path(page).stem in NEEDS:
        pytest.importorskip(NEEDS[Path(page).stem])
    pasted = {"__name__": "__main__"}
    for number, (block, shown) in enumerate(BLOCK.findall(PAGES[page]), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), pasted)
        text = capsys.readouterr().out
        for line in shown.splitlines():
            assert_printed(line.removesuffix("..."), text)


def assert_printed(start, text):
    """Assert that a line of the text starts so. Numbers may differ in the last digit from machine to machine."""
    line = next((v for v in text.splitlines() if without_numbers(v).startswith(without_numbers(start))), None)
    assert line is not None, f"no printed line begins with {start!r}"
    assert numbers(line)[: len(numbers(start))] == pytest.approx(numbers(start), abs=0.11)


@pytest.mark.parametrize("page", ["flax", *NEEDS])
def test_each_page_of_a_library_compares_with_it(page):
    assert any("assert" in block for block in blocks(f"docs/coming_from/{page}.md"))


@pytest.mark.slow
def test_notebook_prints_what_it_shows(tmp_path):
    """Numbers may differ in the last digit from machine to machine."""
    path = ROOT / "docs" / "quickstart.ipynb"
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(path), "--output-dir", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=env, capture_output=True, text=True)
    shown, again = printed(path), printed(tmp_path / path.name)
    assert without_numbers(again) == without_numbers(shown)
    assert numbers(again) == pytest.approx(numbers(shown), abs=0.11)


def printed(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return "".join("".join(o.get("text", [])) for cell in cells for o in cell.get("outputs", []))


def without_numbers(text):
    return re.sub(r"\d+(?:\.\d+)?", "0", text)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


TABLE = {
    "jaxbn": (jaxbn.bn_apply, "momentum", "epsilon"),
    "Flax linen, nnx": ("flax.nnx.BatchNorm", "momentum", "epsilon"),
    "PyTorch": ("torch.nn.BatchNorm2d", "momentum", "eps"),
    "Haiku": ("haiku.BatchNorm", "decay_rate", "eps"),
    "Keras 3": ("keras.layers.BatchNormalization", "momentum", "epsilon"),
    'Equinox, `mode="batch"`': ("equinox.nn.BatchNorm", "momentum", "eps"),
}


@pytest.mark.parametrize("library", TABLE)
def test_table_of_libraries_shows_their_defaults(library, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    owner, momentum, epsilon = TABLE[library]
    if isinstance(owner, str):
        module, _, name = owner.rpartition(".")
        owner = getattr(pytest.importorskip(module), name).__init__
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", PAGES["docs/coming_from/index.md"])
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[0] == library]
    parameters = inspect.signature(owner).parameters
    if parameters[momentum].default is inspect.Parameter.empty:
        assert row[2].startswith("none")
    else:
        assert float(re.split("[, ]", row[2])[0]) == parameters[momentum].default
    assert float(row[3]) == parameters[epsilon].default


def test_versions_name_every_public_record():
    named = [name.rpartition(".") for name in public_names()]
    records = [name for module, _, name in named if hasattr(getattr(importlib.import_module(module), name), "_fields")]
    assert "BatchNormState" in records
    assert [name for name in records if f"`{name}`" not in PAGES["docs/versions.md"]] == []


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 120


SEARCHED = ["FrozenBatchNorm", "SyncBatchNorm", "cross-replica", "TrainState", "NHWC", "jax[cuda]", "EMA"]
SEARCHED += ["gradient accumulation", "use_fast_variance", "precise batch normalization", "AdaBN", "ghost batches"]


@pytest.mark.parametrize("word", SEARCHED)
def test_words_that_people_search_for_occur(word):
    assert any(word.lower() in text.lower() for text in PAGES.values())


def test_pins_of_pre_commit_are_those_of_the_tests():
    pins = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(pins) == set(re.findall(r"^ruff==[\d.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


FOLDERS = ("jaxbn", "tests", "docs", "examples", "experiments", "configs", ".ci", ".github")
FILES = [f"/{path.relative_to(ROOT)}" for top in map(ROOT.joinpath, FOLDERS) for path in (top, *top.rglob("*"))]
FILES += [f"/{path.name}" for path in ROOT.glob("*.*")]
SUFFIXES = ("py", "md", "ipynb", "toml", "json", "yml", "png", "html", "txt", "cff")
# A name with such a suffix, or of something in one of the folders; `*` stands for any characters.
NAMED = re.compile(rf"[\w.*/-]+\.({'|'.join(SUFFIXES)})|({'|'.join(map(re.escape, FOLDERS))})/[\w.*/-]*")
OF_A_RUN = {"config.json", "summary.json", "figure.png"}  # in its folder
HISTORY = ("docs/benchmark/tried.md", "docs/compiled/tried.md")  # of programs that are no longer here


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY] + ["jaxbn/__init__.py"])
def test_files_that_a_page_names_exist(page):
    """The folders before it may be left out, as in a table of the files in `tests/`."""
    words = " ".join(re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())).split()
    paths = {word.rstrip("/") for word in words if NAMED.fullmatch(word)}
    assert {path for path in paths if not fnmatch.filter(FILES, f"*/{path}")} <= OF_A_RUN


TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_targets_of_make_that_pages_name_exist():
    named = {target for text in PAGES.values() for target in re.findall(r"`make ([\w-]+)", text)}
    assert {"test", "docs"} <= named <= set(TARGETS)
