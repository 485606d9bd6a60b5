"""The environment is hostile on purpose: what passes here passes in a careful user's program."""

import gc
import os
import resource
import sys
from pathlib import Path

import jax
import pytest

# Compiling is most of what tests cost, and takes half as long with little optimization. Whoever sets XLA_FLAGS, be it
# to nothing, decides alone: so `.ci/run` and the workflow of GitHub also compile as users do.
QUICK = ["--xla_backend_optimization_level=0"]
QUICK += ["--xla_cpu_use_fusion_emitters=false"] * (jax.__version_info__ < (0, 11))  # later versions do not know it
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# Before any array exists: eight devices on one machine, no silent promotion of dtypes or ranks. Tests that need no more
# than one run on one as well, as most users have it: `TEST_DEVICES=1`.
DEVICES = int(os.environ.get("TEST_DEVICES", "8"))
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs are kept on disk from run to run, and for the other worker.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache" / jax.__version__))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
MEMORY = 2 << 30  # bytes of a process, beyond which it forgets compiled programs between files


def pytest_collection_finish():
    """Collect garbage less often: tracing makes many small objects that stay, and each look at them costs time."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 1_000)


def pytest_sessionstart():
    """Refuse to start without the devices: a skipped multi-device test is a failed test."""
    if jax.device_count() != DEVICES:
        raise RuntimeError(f"The tests need {DEVICES} simulated devices; found {jax.devices()}.")


@pytest.fixture
def ordinary_promotion():
    """JAX's own rules of promotion, for what is not ours to change: other libraries, and examples."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Forget the programs of earlier files once they fill memory: all of them together would take several gigabytes."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) > MEMORY:
        jax.clear_caches()
