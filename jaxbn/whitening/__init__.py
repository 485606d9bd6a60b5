"""Whitening: features that are uncorrelated, not only each of variance 1."""

from jaxbn.whitening._apply import whiten_apply as whiten_apply
from jaxbn.whitening._state import WhitenState as WhitenState
from jaxbn.whitening._state import whiten_init as whiten_init
