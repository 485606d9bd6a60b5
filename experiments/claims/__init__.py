"""The twelve claims about batch normalization, tested on real data.

    python -m experiments.claims

How it is built, from the ground up:

* `intervals`, `verdict`: from numbers of seeds to an estimate, from estimates and criteria to a verdict.
* `config`: what a file of `configs/claims/` holds.
* `study`: the data, the shared trainer, and the memory of finished parts. `networks`: layers that only claims need.
* `measured`: a module for each claim, that trains and returns numbers.
* `judged`: a module for each claim, that makes estimates and a figure of these numbers; no training here.
* `plots`, `report`, `pages`: how it looks, and the words of the report.
* `command`, `__main__`: the command line.
"""
