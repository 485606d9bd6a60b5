"""Batch normalization for Flax linen: the module, and what does something to all layers of a model at once."""

# First: without flax it says what to install.
import jaxbn._flax  # noqa: F401
from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._fold import fold as fold
from jaxbn.linen._health import health as health
from jaxbn.linen._iter_norm import IterNorm as IterNorm
from jaxbn.linen._lstm import BatchNormLSTMCell as BatchNormLSTMCell
from jaxbn.linen._model import affine_mask as affine_mask
from jaxbn.linen._model import convert as convert
from jaxbn.linen._recalibrate import recalibrate as recalibrate
