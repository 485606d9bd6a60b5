"""The libraries' layers with one signature, each as its users write it; and their programs on the arrays of a case.

Parameters are `{"scale", "bias"}` for all of them. What follows a layer is written as people write it: the peers'
outputs are added to and rectified, in ours both are arguments. Haiku and Equinox compute in the dtype of x, which their
users avoid in half precision: x is cast to float32 and the output back, as in haiku's ImageNet example.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
import jaxbn.linen
from experiments.benchmark import torch_layers
from experiments.benchmark.accuracy import Inputs
from experiments.benchmark.clock import Call
from experiments.benchmark.networks import follow
from experiments.benchmark.sizes import TORCH, Case

PROGRAMS = ("forward", "forward+backward", "evaluation")
Tree = Any


class Layer(NamedTuple):
    """A library's batch normalization of some number of features.

    Attributes:
        start: `(mean, var) -> state`, with which evaluation normalizes by these.
        apply: `(params, state, x, residual, train, relu) -> (y, new state)`; no residual is None.
        channels_first: whether x is `[batch, features, ...]`.
    """

    start: Callable[[jax.Array, jax.Array], Tree]
    apply: Callable[..., tuple[jax.Array, Tree]]
    channels_first: bool = False


def functions(features: int, **options: Any) -> Layer:
    """Return `jaxbn.bn_apply`."""

    def start(mean, var):
        return jaxbn.bn_init(features, mean=mean, var=var)[1]

    def apply(params, state, x, residual, train, relu):
        activation = jax.nn.relu if relu else None
        return jaxbn.bn_apply(
            jaxbn.BatchNormParams(**params), state, x, train, activation=activation, residual=residual, **options
        )

    return Layer(start, apply)


def linen(features: int, make: Callable[..., nn.Module], epilogue_inside: bool = False, **options: Any) -> Layer:
    """Return a Flax linen module."""
    del features  # it is that of the parameters

    def apply(params, state, x, residual, train, relu):
        inside = {"activation": jax.nn.relu} if epilogue_inside and relu else {}
        module = make(use_running_average=not train, dtype=x.dtype, **inside, **options)
        call = {"residual": residual} if epilogue_inside else {}
        y, new = module.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"], **call)
        return y if epilogue_inside else follow(y, residual, relu), new["batch_stats"]

    return Layer(lambda mean, var: {"mean": mean, "var": var}, apply)


def haiku(features: int) -> Layer:
    """Return `haiku.BatchNorm`."""
    hk = import_module("haiku")
    network = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.99)(x, train))
    key = jax.random.key(0)

    def average(v):
        return {"counter": jnp.zeros((), jnp.int32), "hidden": v, "average": v}

    def start(mean, var):
        return {"mean": average(mean), "var": average(var)}

    def apply(params, state, x, residual, train, relu):
        def laid_out(v):
            return v.reshape((1,) * (x.ndim - 1) + (features,)) if v.ndim else v

        own = {"scale": laid_out(params["scale"]), "offset": laid_out(params["bias"])}
        kept = {f"batch_norm/~/{name}_ema": jax.tree.map(laid_out, v) for name, v in state.items()}
        y, new = network.apply({"batch_norm": own}, kept, key, x.astype(jnp.float32), train)
        flat = {k: jax.tree.map(lambda v: v.ravel() if v.ndim else v, new[f"batch_norm/~/{k}_ema"]) for k in state}
        return follow(y.astype(x.dtype), residual, relu), flat

    return Layer(start, apply)


def equinox(features: int) -> Layer:
    """Return `equinox.nn.BatchNorm`, channels first, `mode="batch"` as its authors advise."""
    eqx = import_module("equinox")
    module, fresh = eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, axis_name="batch", mode="batch")

    def start(mean, var):
        return fresh.set(module.batch_state_index, (mean, var))

    def apply(params, state, x, residual, train, relu):
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), module, (params["scale"], params["bias"]))
        layer = eqx.nn.inference_mode(layer, not train)
        over = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, new = over(x.astype(jnp.float32), state)
        return follow(y.astype(x.dtype), residual, relu), new

    return Layer(start, apply, channels_first=True)


MODULES: dict[str, Callable[..., nn.Module]] = {
    "jaxbn": jaxbn.linen.BatchNorm,
    "flax": nn.BatchNorm,
    "flax, stable": partial(nn.BatchNorm, use_fast_variance=False),
}
# By the name that tables show. The modules of jaxbn compile to what its functions do.
LAYERS: dict[str, Callable[..., Layer]] = {
    "jaxbn": functions,
    "jaxbn.linen": partial(linen, make=MODULES["jaxbn"], epilogue_inside=True),
    "flax": partial(linen, make=MODULES["flax"]),
    "flax, stable": partial(linen, make=MODULES["flax, stable"]),
    "haiku": haiku,
    "equinox": equinox,
}
ABSENT = [name for name in ("haiku", "equinox", "torch") if find_spec(name) is None]


def present(names: tuple[str, ...]) -> list[str]:
    """Return those of `names` whose library is installed."""
    return [name for name in names if name.split(",")[0] not in ABSENT]


def arguments(layer: Layer, host: Inputs) -> tuple[Any, ...]:
    """Return `(params, state, x, residual, gradient of y)` on the device, for the programs below."""

    def placed(v):
        v = None if v is None else jnp.asarray(v)
        return jnp.moveaxis(v, -1, 1) if layer.channels_first and v is not None else v

    params = {"scale": jnp.asarray(host.scale), "bias": jnp.asarray(host.bias)}
    state = layer.start(jnp.asarray(host.mean), jnp.asarray(host.var))
    return params, state, placed(host.x), placed(host.residual), placed(host.g)


def program(layer: Layer, kind: str, relu: bool) -> Callable[..., dict[str, Tree]]:
    """Return the timed function of `(params, state, x, residual, gradient of y)`; its results are all used."""

    def apply(params, state, x, residual, train=True):
        return layer.apply(params, state, x, residual, train, relu)

    def forward(params, state, x, residual, g):
        y, new = apply(params, state, x, residual)
        return {"y": y, "state": new}

    def both(params, state, x, residual, g):
        y, backward, new = jax.vjp(lambda p, x, r: apply(p, state, x, r), params, x, residual, has_aux=True)
        d_params, dx, d_residual = backward(g)
        return {"y": y, "state": new, "d_params": d_params, "dx": dx, "d_residual": d_residual}

    def evaluation(params, state, x, residual, g):
        return {"y": apply(params, state, x, residual, train=False)[0]}

    return {"forward": forward, "forward+backward": both, "evaluation": evaluation}[kind]


class Contender(NamedTuple):
    """One library on the arrays of a case.

    Attributes:
        calls: by the name of the program.
        read: one of a call's arrays, float64, features last, the first `n` of them.
    """

    calls: dict[str, Call]
    read: Callable[[Any, int], np.ndarray]


def contender(name: str, case: Case, host: Inputs) -> Contender:
    """Put the arrays `host` into the library `name`."""
    if name == TORCH:
        return _torch(case, host)
    layer = LAYERS[name](case.shape[-1])
    args = arguments(layer, host)
    queued = jax.default_backend() != "cpu"

    def read(v, n):
        v = np.asarray((jnp.moveaxis(v, 1, -1) if layer.channels_first and v.ndim > 1 else v)[..., :n])
        return v.astype(np.float64)

    def call(kind):
        run = partial(compiled(name, case.shape[-1], kind, case.relu), *args)
        return Call(run, jax.block_until_ready, queued)

    return Contender({kind: call(kind) for kind in PROGRAMS}, read)


@cache
def compiled(name: str, features: int, kind: str, relu: bool) -> Any:
    """Return the program, compiled once for all arrays of a shape."""
    return jax.jit(program(LAYERS[name](features), kind, relu))


def _torch(case: Case, host: Inputs) -> Contender:
    programs = torch_layers.programs(host, case.dtype, case.relu)
    queued = torch_layers.on_gpu()
    wait = torch_layers.wait if queued else (lambda out: None)
    return Contender(
        {kind: Call(run, wait, queued) for kind, run in programs.items()}, lambda v, n: torch_layers.array(v)[..., :n]
    )
