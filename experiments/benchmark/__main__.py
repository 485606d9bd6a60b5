"""The command line: `python -m experiments.benchmark [--quick] [--output DIR] [--replace] [--readme PAGE]`.

Freed memory stays in the process: what is timed is the work on arrays, not getting pages for them. By default the C
library returns a large array's pages to the kernel when the array is freed, and the page faults of getting them back
can be most of a layer's time on a CPU. It reads these settings when a process begins, and they hold for all libraries.
"""

import os
import sys

SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
}

if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)

    from experiments.benchmark.command import main

    sys.exit(main(sys.argv[1:]))
