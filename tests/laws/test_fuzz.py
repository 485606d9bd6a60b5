"""Generated layers against the oracle: 100 in `make slow`, more by `make fuzz N=10000`; see fuzz.py."""

import fuzz
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 100, 50))
def test_generated_layers_agree(start):
    assert not fuzz.run(range(start, start + 50))


@pytest.mark.parametrize("seed", range(6))
def test_a_few_generated_layers_agree(seed):
    assert not fuzz.disagreements(fuzz.draw_layer(seed), seed)


def test_a_wrong_result_is_found(monkeypatch):
    layer, training = fuzz.draw_layer(0), fuzz.oracle.training
    monkeypatch.setattr(
        fuzz.oracle, "training", lambda *args, **options: training(*args, **options | {"epsilon": 1e-2})
    )
    assert "y" in fuzz.disagreements(layer, 0)


def test_a_disagreement_is_shrunk(monkeypatch):
    """What a disagreement does not need becomes plain."""
    layer = fuzz.draw_layer(0)._replace(way="eager", groups="none")
    monkeypatch.setattr(fuzz, "disagreements", lambda layer, seed: {"y": 2.0} if layer.activation != "none" else {})
    shrunk = fuzz.shrink(layer._replace(activation="tanh"), 0)
    assert shrunk.activation == "tanh"
    assert shrunk._replace(activation="none") == fuzz.Layer(**fuzz.PLAIN)
