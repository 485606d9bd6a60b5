"""Running statistics from other data than training batches: adaptation, recalibration, each example's own."""

from jaxbn.statistics._adapt import adapt as adapt
from jaxbn.statistics._example_weight import apply_with_example_weight as apply_with_example_weight
from jaxbn.statistics._pool_batches import pool_batches as pool_batches
