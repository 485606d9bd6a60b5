"""Fold batch normalization into the layers beside it."""

from jaxbn.inference._fold import fold as fold
from jaxbn.inference._fold import fold_into_next as fold_into_next
