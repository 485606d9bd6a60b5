"""Small runs of the trainer: compiled here, or in processes of their own with the files that they leave."""

import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.training import config, data, networks, train

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
TINY = ["--widths", "8", "--steps", "10", "--log-every", "5", "--seeds", "2", "--devices", "2"]
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
    """Return the arrays of the last checkpoint."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        args = ocp.args.Composite(carry=ocp.args.StandardRestore(fallback_sharding=here))
        return jax.tree.map(np.asarray, jax.tree.leaves(manager.restore(manager.latest_step(), args=args)["carry"]))


def tiny(**changes) -> config.Settings:
    """Return the settings of a run of six steps."""
    small = {"widths": (8,), "steps": 6, "log_every": 3, "seeds": 2, "learning_rates": (0.1, 1.0), "activation": "relu"}
    return dataclasses.replace(config.load(QUICKSTART).settings, **small | changes)


@cache
def digits() -> data.Data:
    """Load the data once."""
    return data.digits()


@cache
def trajectory(norm="batch", **changes):
    """Return the metrics of each chunk of a tiny run, and the parameters and the evaluated state at its end."""
    settings, log = tiny(**changes), []
    arm = train.compile_arm(settings, networks.build(settings, norm))
    end = train.train(settings, arm, digits(), lambda step, metrics, carry: log.append(metrics))
    return jax.device_get((log, end.carry.params, end.carry.state))


def same(a, b, **tolerance):
    """Return whether two trajectories agree within the tolerance."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, **tolerance) for x, y in leaves)


# Sums over the batch are taken in another order on another number of devices: an error of a unit or two in the last
# place of float32 (1e-7) at each of six steps, which these well-conditioned runs do not amplify much.
ROUNDING = {"rtol": 3e-6, "atol": 3e-6}
