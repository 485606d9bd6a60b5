"""The page for newcomers: each snippet runs, with the other library beside ours wherever it is installed."""

import inspect
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
# Snippets show JAX as users have it.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def sections() -> dict[str, list[str]]:
    """Title -> its snippets, which are one program."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def assert_close(got, wanted):
    """The same tree and shapes, and the same values to a float32's accuracy."""
    chex.assert_trees_all_equal_shapes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


def scope():
    """The names that a snippet may use without importing them."""
    x = np.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 3)), np.float32)
    return {"jax": jax, "jnp": jnp, "np": np, "jaxbn": jaxbn, "x": x, "assert_close": assert_close}


NEEDS = {"PyTorch": "torch", "Haiku": "haiku", "Keras": "keras", "Equinox": "equinox"}


@pytest.mark.parametrize("title", sections())
def test_snippets(title, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    names = scope()
    for snippet in sections()[title]:
        exec(compile(snippet, f"coming_from.md, {title}", "exec"), names)


def test_every_section_compares():
    """A snippet that asserts nothing shows nothing: each section does at least once."""
    ours = {"Recipes that others lack", "Reinforcement learning: CrossQ's critic"}
    assert set(sections()) == {"Flax linen", "Flax nnx", *ours, *NEEDS}
    for title, snippets in sections().items():
        assert any("assert" in snippet for snippet in snippets), title


TABLE = {
    "jaxbn": (jaxbn.bn_apply, "momentum", "epsilon"),
    "Flax linen, nnx": ("flax.nnx.BatchNorm", "momentum", "epsilon"),
    "PyTorch": ("torch.nn.BatchNorm2d", "momentum", "eps"),
    "Haiku": ("haiku.BatchNorm", "decay_rate", "eps"),
    "Keras 3": ("keras.layers.BatchNormalization", "momentum", "epsilon"),
    'Equinox, `mode="batch"`': ("equinox.nn.BatchNorm", "momentum", "eps"),
}


@pytest.mark.parametrize("library", TABLE)
def test_the_table_says_what_the_signatures_say(library, monkeypatch):
    """The defaults of momentum and epsilon."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    owner, momentum, epsilon = TABLE[library]
    if isinstance(owner, str):
        module, _, name = owner.rpartition(".")
        owner = getattr(pytest.importorskip(module), name).__init__
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[0] == library]
    parameters = inspect.signature(owner).parameters
    if parameters[momentum].default is inspect.Parameter.empty:
        assert row[2].startswith("none")
    else:
        assert float(re.split("[, ]", row[2])[0]) == parameters[momentum].default
    assert float(row[3]) == parameters[epsilon].default
