"""Draw the training of ResNet-20 on the 5,000 MNIST images, by `examples/resnet_linen.py` and with its flags.

python examples/figures/resnet20_mnist.py
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import tyro

EXAMPLES = Path(__file__).parents[1]
DOCS = EXAMPLES.parent / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))


def hardware() -> str:
    """Return the name of the device, and of how many cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} {device.device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def main() -> None:
    """Train, and write `resnet20_mnist.json` and `resnet20_mnist.png` into `docs/examples`."""
    import resnet_linen

    began, load = time.time(), os.getloadavg()[0]
    result = resnet_linen.main(tyro.cli(resnet_linen.Config))
    result.pop("state")
    record = {
        "command": " ".join(["python examples/figures/resnet20_mnist.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "load average before": load,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mlxtend")},
        "seconds": round(time.time() - began),
        "CPU seconds": round(time.process_time()),
        **result,
        "losses": [round(float(v), 4) for v in result["losses"]],
    }
    (DOCS / "resnet20_mnist.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record)


def draw(record: dict) -> None:
    """Draw the loss of each step and the test accuracy after each epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(range(1, len(record["losses"]) + 1), record["losses"], lw=0.8)
    left.set(xlabel="step", ylabel="training loss, label smoothing 0.1")
    steps = [int(step) for step in record["curve"]]
    right.plot(steps, [100 * v for v in record["curve"].values()], "o-", label="after each epoch")
    averaged = 100 * record["test accuracy, averaged weights"]
    right.plot(steps[-1], averaged, "s", label="averaged weights, recalibrated")
    right.set(xlabel="step", ylabel="accuracy on 1,000 test images, %")
    right.legend()
    figure.suptitle(f"ResNet-20, 4,000 MNIST images, {record['hardware']}", fontsize=9)
    figure.savefig(DOCS / "resnet20_mnist.png", dpi=120)


if __name__ == "__main__":
    main()
