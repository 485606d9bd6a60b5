"""Experiments with batch normalization on real digits: one training loop, and configs that each make a claim.

    python -m experiments configs/quickstart.toml

How it is built, from the ground up:

* `config`: what a run is; a TOML file and the command line, validated before anything runs.
* `shapes`, `files`, `data`: the digits or what a user has on disk, the split, and which examples each step sees.
* `layers`, `models`, `recurrent`, `networks`: norms with their activations, and an MLP, an LSTM and a small CNN of
  them, as pairs of pure functions.
* `parallel`: the ways to spread a step over devices, and the scope of its statistics.
* `train`: the loop.
* `disk`, `record`, `summary`, `figure`, `tables`: how and what is written, what it amounts to, how it looks.
* `memory`, `interrupt`, `command`, `__main__`: what a run needs, how it ends early, and the command line.
* `statistics`, `variants`: other ways to evaluate, and the README's table of variants.
* `claims`, `benchmark`: twelve claims with their report, and time and memory; packages with a command of their own.
"""
