"""Normalize in Flax linen: the modules, and tools for all normalizations of a model."""

# First: without flax its error says `pip install jaxbn[flax]`.
import jaxbn._flax  # noqa: F401
from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._fold import fold as fold
from jaxbn.linen._health import health as health
from jaxbn.linen._iter_norm import IterNorm as IterNorm
from jaxbn.linen._lstm import BatchNormLSTMCell as BatchNormLSTMCell
from jaxbn.linen._model import affine_mask as affine_mask
from jaxbn.linen._model import convert as convert
from jaxbn.linen._recalibrate import recalibrate as recalibrate
