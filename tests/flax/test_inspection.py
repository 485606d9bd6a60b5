"""Look at modules by the tools of flax."""

import warnings
from typing import Any

import flax.linen as nn
import pytest
from flax import nnx
from flax_layers import KEY, SEQUENCES, X, norm, rngs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def folded():
    return jaxbn.nnx.fold(nnx.Sequential(nnx.Linear(3, 3, rngs=rngs()), norm()), X)


MODULES = {
    "BatchNorm": norm,
    "schedules": lambda: norm(momentum=jaxbn.zero_debiased(0.9), renorm=jaxbn.renorm_warmup()),
    "IterNorm": lambda: jaxbn.nnx.IterNorm(3, rngs=rngs()),
    "BatchNormLSTMCell": lambda: jaxbn.nnx.BatchNormLSTMCell(3, 5, 4, rngs=rngs()),
    "Folded": folded,
}


@pytest.mark.parametrize("name", MODULES)
def test_nnx_modules_can_be_looked_at(name, capsys):
    module: Any = MODULES[name]()
    info = nnx.view_info(module)
    assert "use_running_average: bool | None = None" in info
    assert "None\n    w" in info  # and its description
    assert repr(module)
    nnx.display(module)
    assert capsys.readouterr().out
    if name != "Folded":  # folding compares numbers
        assert isinstance(nnx.eval_shape(MODULES[name]), type(module))
    if name != "BatchNormLSTMCell":  # flax's own `RNN` cannot be tabulated
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "Summary" in nnx.tabulate(module, X)


def test_linen_modules_can_be_looked_at():
    cell = jaxbn.linen.BatchNormLSTMCell(5, 4, use_running_average=True)
    rnn = nn.RNN(cell, variable_broadcast=("params", "batch_stats"))
    for module, x in ((jaxbn.linen.BatchNorm(False), X), (jaxbn.linen.IterNorm(False), X), (rnn, SEQUENCES)):
        assert "batch_stats" in module.tabulate(KEY, x)
