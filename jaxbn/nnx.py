"""Batch normalization for Flax nnx: the module, and what does something to all of a model's layers at once."""

# First: without flax it says what to install.
from jaxbn import _flax as _flax
from jaxbn._nnx_batch_norm import BatchNorm as BatchNorm
from jaxbn._nnx_fold import fold as fold
from jaxbn._nnx_health import health as health
from jaxbn._nnx_iter_norm import IterNorm as IterNorm
from jaxbn._nnx_lstm import BatchNormLSTMCell as BatchNormLSTMCell
from jaxbn._nnx_model import affine_mask as affine_mask
from jaxbn._nnx_model import convert as convert
from jaxbn._nnx_recalibrate import recalibrate as recalibrate
