"""Batch normalization for Flax linen: the module, and what does something to all layers of a model at once."""

# First: without flax it says what to install.
from jaxbn import _flax as _flax
from jaxbn._linen_batch_norm import BatchNorm as BatchNorm
from jaxbn._linen_fold import fold as fold
from jaxbn._linen_health import health as health
from jaxbn._linen_iter_norm import IterNorm as IterNorm
from jaxbn._linen_lstm import BatchNormLSTMCell as BatchNormLSTMCell
from jaxbn._linen_model import affine_mask as affine_mask
from jaxbn._linen_model import convert as convert
from jaxbn._linen_recalibrate import recalibrate as recalibrate
