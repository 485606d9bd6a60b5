"""The command line: `python -m experiments.compiled measure {tpu,gpu}`, and `python -m experiments.compiled report`."""

import sys

from experiments.compiled.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
