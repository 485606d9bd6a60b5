"""Measurements of jaxbn beside the batch normalization of Flax, haiku, Equinox and PyTorch.

    python -m experiments.benchmark --quick

Libraries that are not installed are named and left out. On a GPU the same command measures there, with larger batches.

How it is built, from the ground up:

* `steady`, `sizes`, `clock`: the memory allocator, what is measured and how much of it, and how time is taken.
* `accuracy`: inputs, the exact results, and distances from them.
* `layers`, `torch_layers`, `contenders`: every library on the same arrays, with one signature.
* `errors`, `times`, `dispatch`: one layer. `passes`, `memory`: one, and many under `lax.scan`. `collectives`: one on 8
  devices.
* `networks`, `compiling`, `training`: deep networks; how long they compile, and what ResNet-50's training takes.
* `measures`: all but `times` as rows. `bars`: what was promised, and the verdicts. `report`, `figures`: how it looks.
* `command`, `__main__`: the command line.
"""
