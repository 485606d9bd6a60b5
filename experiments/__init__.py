"""Experiments with batch normalization on real digits: one training loop, and configs that each make a claim.

    python -m experiments configs/quickstart.toml

* `training`: the configs, the data, the networks and the loop.
* `claims`, `benchmark`, `compiled`: twelve claims with their report, time and memory, and what XLA's compilers for GPUs
  and TPUs make of the layer; packages with a command of their own.
* `disk`, `memory`, `allocator`, `interrupt`: how files are written, what a run needs, where freed memory stays, how a
  run ends early.
* `tables`, `figures`: Markdown tables, and figures in one style.
"""
