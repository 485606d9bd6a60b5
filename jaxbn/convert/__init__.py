"""Conversion of checkpoints of PyTorch, Keras, Haiku, Equinox and Flax from and to params and state.

The same words mean different things in these libraries; to continue training, `bn_apply` needs:

    library          momentum m        epsilon   running variance   features     bn_apply(...)
    jaxbn            kept, 0.99        1e-5      biased             last
    PyTorch          taken, 0.1        1e-5      unbiased           axis 1       momentum=1 - m, axis=1,
                                                                                 unbiased_running_var=True
    PyTorch, None    plain mean        1e-5      unbiased           axis 1       momentum=cumulative_average, the rest
                                                                                 as above
    Keras 3          kept, 0.99        1e-3      biased             last         momentum=m, epsilon=1e-3
    Haiku            kept, debiased    1e-5      biased             last         momentum=zero_debiased(m)
    Equinox "batch"  kept, debiased    1e-5      biased             axis 1       momentum=zero_debiased(m), axis=1
    Equinox "ema"    kept, 1st copied  1e-5      biased             axis 1       momentum=m, axis=1; see `from_equinox`
    Flax             kept, 0.99        1e-5      biased             last         momentum=m

Equinox's features are axis 0 of one example, so axis 1 of the batch that `jax.vmap` maps over.

Every pair of functions is exact: a layer converted there and back is the same bit by bit. Excepted are the hidden
averages of Haiku and Equinox, which are computed from the debiased ones, or these from those; and a number of updates
where one side keeps none. Parameters keep their dtype, statistics are float32 at least, and float64 needs JAX's 64-bit
mode.
"""

from jaxbn.convert._equinox import from_equinox as from_equinox
from jaxbn.convert._equinox import to_equinox as to_equinox
from jaxbn.convert._flax import from_linen as from_linen
from jaxbn.convert._flax import from_nnx as from_nnx
from jaxbn.convert._flax import to_linen as to_linen
from jaxbn.convert._flax import to_nnx as to_nnx
from jaxbn.convert._haiku import from_haiku as from_haiku
from jaxbn.convert._haiku import to_haiku as to_haiku
from jaxbn.convert._keras import from_keras as from_keras
from jaxbn.convert._keras import to_keras as to_keras
from jaxbn.convert._network import from_keras_network as from_keras_network
from jaxbn.convert._network import from_torch_network as from_torch_network
from jaxbn.convert._torch import from_torch as from_torch
from jaxbn.convert._torch import to_torch as to_torch
