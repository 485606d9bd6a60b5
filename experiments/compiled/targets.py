"""The targets: cards by the number, the options of their compilers, and their meshes."""

import contextlib
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

# The card's data sheet, in the format in which XLA describes the GPUs that it compiles for.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Bytes a second between a card and its memory, as its maker publishes them.
BANDWIDTH = {"H100": 3.35e12, "TPU v5e": 0.819e12, "TPU v5p": 2.765e12}
# Before JAX is imported. Without them, libtpu asks a metadata server for the machine that it is on, and XLA times
# candidates for each kernel on a GPU that is not there.
ENVIRONMENT = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    },
    "gpu": {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    },
}
# Without which nothing can be compiled; those of CUDA must be of JAX's own release.
PACKAGES = {
    "tpu": ("jax", "jaxlib", "flax", "libtpu"),
    "gpu": (
        "jax",
        "jaxlib",
        "flax",
        "jax-cuda13-plugin",
        "jax-cuda13-pjrt",
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cudnn-cu13",
    ),
}


class Target(NamedTuple):
    """A number of cards; `topology` names at least as many, of which the first `devices` are taken."""

    kind: str
    card: str
    devices: int
    topology: str


def list_h100s(devices: int) -> Target:
    """Return H100s, eight to a host where their number allows."""
    return Target("gpu", "H100", devices, f"1x{devices // 8}x8" if devices % 8 == 0 else f"1x{devices}x1")


TARGETS = {
    **{f"h100-{n}": list_h100s(n) for n in (1, 8, 64, 127, 256, 1024)},
    "v5e-4": Target("tpu", "TPU v5e", 4, "v5e:2x2"),
    "v5e-64": Target("tpu", "TPU v5e", 64, "v5e:8x8"),
    "v5e-256": Target("tpu", "TPU v5e", 256, "v5e:16x16"),
    "v5p-127": Target("tpu", "TPU v5p", 127, "v5p:4x4x8"),  # of v5e's 8x8 and larger, the compiler wants all
    "v5p-4096": Target("tpu", "TPU v5p", 4096, "v5p:16x16x16"),
}


def find_versions(kind: str) -> dict[str, str]:
    """Return the installed versions of the packages that `kind` needs.

    Raises:
        ValueError: one is missing or of another release than JAX, or JAX is older than 0.12.
    """
    versions = {}
    for name in PACKAGES[kind]:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if missing := [name for name in PACKAGES[kind] if name not in versions]:
        raise ValueError(
            f"measuring {kind} targets needs {', '.join(missing)}, not installed here. They come with the extra "
            f"`compiled-{kind}`, which `make compiled` installs."
        )
    if tuple(int(n) for n in versions["jax"].split(".")[:2]) < (0, 12):
        raise ValueError(
            f"the measurements are of JAX 0.12 and newer, on Python 3.12 and newer; JAX {versions['jax']}."
        )
    other = [f"{name} {v}" for name, v in versions.items() if name.startswith("jax") and v != versions["jax"]]
    if other:
        raise ValueError(f"all of JAX must be of one release; JAX is {versions['jax']}, beside {', '.join(other)}.")
    return versions
