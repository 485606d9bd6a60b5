"""Find why a model with batch normalization fails in evaluation."""

from jaxbn.diagnostics._compare import Batch as Batch
from jaxbn.diagnostics._health import health as health
from jaxbn.diagnostics._report import Health as Health
from jaxbn.diagnostics._report import LayerHealth as LayerHealth
