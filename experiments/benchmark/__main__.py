"""The command line: `python -m experiments.benchmark [--quick] [--output DIR] [--replace] [--readme PAGE]`."""

import sys

from experiments.benchmark import steady

if __name__ == "__main__":
    steady.restart()

    from experiments.benchmark.command import main

    sys.exit(main(sys.argv[1:]))
