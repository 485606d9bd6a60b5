"""The twelve claims about batch normalization, tested on real data.

    python -m experiments.claims

A folder for each claim: `config.toml` has the question and the criteria, `measure` trains and returns numbers, `judge`
makes estimates and a figure of them, `page.md` has the words, `result.json` the record of the last full run. `_lib` has
what they share.
"""
