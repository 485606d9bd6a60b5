"""Normalize in Flax nnx: the modules, and tools for all normalizations of a model."""

# First: without flax its error says `pip install jaxbn[flax]`.
import jaxbn._flax  # noqa: F401
from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._fold import fold as fold
from jaxbn.nnx._health import health as health
from jaxbn.nnx._iter_norm import IterNorm as IterNorm
from jaxbn.nnx._lstm import BatchNormLSTMCell as BatchNormLSTMCell
from jaxbn.nnx._model import affine_mask as affine_mask
from jaxbn.nnx._model import convert as convert
from jaxbn.nnx._recalibrate import recalibrate as recalibrate
