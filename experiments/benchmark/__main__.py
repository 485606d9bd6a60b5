"""The command line: `python -m experiments.benchmark [--quick] [--output DIR] [--readme PAGE]`."""

import os
import sys

# The C library then keeps the pages that it once had from the kernel. By default it returns a large array's pages when
# the array is freed, and the page faults of getting them back can be most of a layer's time on a CPU. It reads these
# when a process begins, and they hold for all libraries alike.
STEADY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
}

if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in STEADY.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | STEADY)

    from experiments.benchmark.command import main

    sys.exit(main(sys.argv[1:]))
