"""Runs of the trainer in processes of their own, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
SMALL = (
    *("configs/quickstart.toml", "--arms", "batch", "--widths", "4", "--seeds", "2", "--learning-rates", "0.3"),
    *("--log-every", "5", "--checkpoint-every", "5", "--devices", "2"),
)


def start(folder, *more, environment=()):
    """Start a run."""
    cache = ROOT / ".jax_cache" / jax.__version__
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "experiments", *SMALL, "--out", str(folder), *more],
        cwd=ROOT,
        env=os.environ | own | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, timeout=900):
    """Wait for the processes; what each printed, and their exit codes."""
    try:
        printed = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return printed, [p.returncode for p in processes]


def last_carry(folder):
    """The arrays of the last checkpoint."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        args = ocp.args.Composite(carry=ocp.args.StandardRestore(fallback_sharding=here))
        return jax.tree.map(np.asarray, jax.tree.leaves(manager.restore(manager.latest_step(), args=args)["carry"]))
