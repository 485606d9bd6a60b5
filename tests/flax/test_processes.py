"""Diagnose, recalibrate and fold with a batch over several processes."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx
from flax_layers import norm, rngs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


MANY = """
import sys, jax, numpy as np
port, me = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, me)
from flax import nnx
import flax.linen as nn
import jax.numpy as jnp, jaxbn.nnx, jaxbn.linen
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = np.random.default_rng(0).normal(2, 3, size=(16, 3)).astype(np.float32)
x = jax.make_array_from_callback(rows.shape, jax.NamedSharding(mesh, jax.P("data")), lambda i: rows[i])
assert not x.is_fully_addressable
model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
found = jaxbn.nnx.health(model, x)
jaxbn.nnx.recalibrate(model, [x])
new = jaxbn.nnx.fold(model, x)
linen = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(use_running_average=True)])
variables = linen.init(jax.random.key(0), rows)
also = jaxbn.linen.health(variables, linen.apply, x)
jaxbn.linen.fold(linen.apply, variables, x)
print("RESULT", found[0].batch.examples, round(found[0].batch.mean, 3), also[0].batch.examples)
"""


@pytest.mark.slow
def test_a_batch_over_several_processes():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", MANY, str(port)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ran = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    outs = [process.communicate(timeout=240) for process in ran]
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs()), norm())
    x = np.random.default_rng(0).normal(2, 3, size=(16, 3)).astype(np.float32)
    alone = jaxbn.nnx.health(model, x)[0].batch
    for out, err in outs:
        line = [line for line in out.splitlines() if line.startswith("RESULT")]
        assert line, err[-3000:]
        _, examples, mean, also = line[0].split()
        assert (examples, also) == ("16", "16")
        assert float(mean) == pytest.approx(alone.mean, abs=2e-3)
