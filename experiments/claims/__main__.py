"""The command line: `python -m experiments.claims [--only NAME] [--smoke]`; `--help` lists the rest."""

import sys

from experiments.allocator import keep_pages
from experiments.interrupt import Interrupt

if __name__ == "__main__":
    keep_pages()
    # Before the slow imports: Ctrl-C is then understood from the first moment.
    with Interrupt() as interrupt:
        from experiments.claims._lib.command import main

        sys.exit(main(sys.argv[1:], interrupt))
