"""The command line: `python -m experiments.benchmark [--quick] [--output DIR] [--replace] [--readme PAGE]`.

Freed memory stays in the process, with all libraries: what is timed is the work on arrays, not getting pages for them.
"""

import sys

from experiments.allocator import keep_pages

if __name__ == "__main__":
    keep_pages()

    from experiments.benchmark.command import main

    sys.exit(main(sys.argv[1:]))
