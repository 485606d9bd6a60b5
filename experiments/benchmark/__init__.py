"""Measurements of jaxbn beside the batch normalization of Flax, haiku, Equinox and PyTorch.

    python -m experiments.benchmark --quick

Libraries that are not installed are named and left out. On a GPU the same command measures there, with larger batches.

How it is built, from the ground up:

* `sizes`, `clock`, `accuracy`: what is measured and how much of it; how time is taken; exact results, and the distances
  from them.
* `torch_layers`, `layers`: every library on the same arrays, with one signature.
* `one_layer`: times, errors, the cost of a call. `hlo`, `memory`: what is read off a compiled program, of one layer and
  of many under `lax.scan`. `collectives`: what one sends on 8 devices.
* `networks`, `training`: deep networks; how long they compile, and the time and memory of a training step.
* `bars`: what was promised, and the verdicts. `report`, `figures`: how it looks.
* `command`, `__main__`: the command line, and the memory allocator.
"""
