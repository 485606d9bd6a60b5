"""Generated layers against the oracle: 100 programs in `make slow`, more by `make fuzz N=10000`; see fuzz.py."""

import fuzz
import jax
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 100, 50))
def test_generated_layers_agree(start):
    """Each of a program of its own, as users compile it."""
    assert not fuzz.run(range(start * fuzz.SHARED, (start + 50) * fuzz.SHARED, fuzz.SHARED))


@pytest.mark.parametrize("seed", range(0, 6 * fuzz.SHARED, fuzz.SHARED))
def test_a_few_generated_layers_agree(seed):
    assert not fuzz.disagreements(fuzz.draw_layer(seed), seed)


@pytest.mark.parametrize("seed", [1528, 2959, 4680], ids=["a kink", "beyond float16", "a residual that cancels"])
def test_right_results_are_not_taken_for_wrong(seed):
    """Three kinds that 10,000 layers had found, each a fault of this comparison."""
    assert not fuzz.disagreements(fuzz.draw_layer(seed), seed)


def test_a_wrong_result_is_found(monkeypatch):
    layer, training = fuzz.Layer(**fuzz.PLAIN), fuzz.oracle.training
    monkeypatch.setattr(
        fuzz.oracle, "training", lambda *args, **options: training(*args, **options | {"epsilon": 1e-2})
    )
    assert "y" in fuzz.disagreements(layer, 0)


@pytest.mark.parametrize("program", [11, 14], ids=["state as an argument", "state compiled in"])
def test_seeds_share_a_program(program, caplog):
    seeds = range(program * fuzz.SHARED, (program + 1) * fuzz.SHARED)
    layers = [fuzz.draw_layer(seed) for seed in seeds]
    assert layers[0].way == "jit"
    assert len(set(layers)) > 1
    inputs = [fuzz.make_inputs(layer, seed) for layer, seed in zip(layers, seeds, strict=True)]
    assert len({given.x.tobytes() for given in inputs}) == fuzz.SHARED
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for layer, given, seed in zip(layers, inputs, seeds, strict=True):
            fuzz.compute(layer, given, seed)
    assert sum("Compiling jit(member)" in record.getMessage() for record in caplog.records) == 1


def test_a_disagreement_is_shrunk(monkeypatch):
    """Options that a disagreement does not need become plain."""
    layer = fuzz.draw_layer(0)._replace(way="eager", groups="none")
    monkeypatch.setattr(fuzz, "disagreements", lambda layer, seed: {"y": 2.0} if layer.activation != "none" else {})
    shrunk = fuzz.shrink(layer._replace(activation="tanh"), 0)
    assert shrunk.activation == "tanh"
    assert shrunk._replace(activation="none") == fuzz.Layer(**fuzz.PLAIN)
