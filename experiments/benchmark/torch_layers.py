"""PyTorch's layer, eager, as its users write it: addition and ReLU in place, as in torchvision's ResNet."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import numpy as np

from experiments.benchmark.accuracy import Inputs


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_gpu() -> bool:
    """Return whether there is a GPU, for PyTorch and for JAX."""
    return jax.default_backend() == "gpu" and import_module("torch").cuda.is_available()


def tensor(v: np.ndarray, dtype: Any) -> Any:
    """Return `v`, features last, as a tensor whose features come second; the memory stays as it is."""
    torch = import_module("torch")
    t = torch.from_numpy(np.ascontiguousarray(v.astype(np.float32))).to(dtype)
    if t.ndim == 4:
        t = t.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return t.to("cuda" if on_gpu() else "cpu")


def array(t: Any) -> np.ndarray:
    """Return the tensor as a float64 array, features last."""
    v = t.detach().to("cpu").double().numpy()
    return np.moveaxis(v, 1, -1) if v.ndim == 4 else v


def programs(host: Inputs, dtype_name: str, relu: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the three programs on the arrays `host`, by name; see `layers.program`."""
    torch = import_module("torch")
    torch.set_num_threads(cores())
    dtype = getattr(torch, dtype_name)
    x, g = (tensor(v, dtype) for v in (host.x, host.g))
    residual = None if host.residual is None else tensor(host.residual, dtype)
    kind = torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d

    def module():
        layer = kind(x.shape[1], momentum=0.01, device=x.device)
        own = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        with torch.no_grad():
            for to, v in zip(own, (host.scale, host.bias, host.mean, host.var), strict=True):
                to.copy_(torch.from_numpy(v))
        return layer

    # One to train and one to evaluate: training moves the running statistics.
    layer, frozen = module(), module().eval()
    wanted = [layer.weight, layer.bias, *(v.requires_grad_() for v in (x, residual) if v is not None)]

    def apply(layer):
        y = layer(x)
        if residual is not None:
            y += residual
        return torch.nn.functional.relu(y, inplace=True) if relu else y

    def forward():
        return {"y": apply(layer), "state": {"mean": layer.running_mean, "var": layer.running_var}}

    def both():
        out = forward()
        d_scale, d_bias, dx, *rest = torch.autograd.grad(out["y"], wanted, g)
        d_params = {"scale": d_scale, "bias": d_bias}
        return out | {"d_params": d_params, "dx": dx, "d_residual": rest[0] if rest else None}

    def evaluation():
        with torch.inference_mode():
            return {"y": apply(frozen)}

    return {"forward": forward, "forward+backward": both, "evaluation": evaluation}


def kept(host: Inputs, dtype_name: str, relu: bool) -> int:
    """Return the bytes that autograd keeps for the backward pass of one layer, each piece of memory once."""
    torch = import_module("torch")
    pieces = {}

    def pack(t):
        pieces[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    run = programs(host, dtype_name, relu)["forward"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(pieces.values())


def wait(_: Any) -> None:
    """Wait until the GPU is done."""
    import_module("torch").cuda.synchronize()
