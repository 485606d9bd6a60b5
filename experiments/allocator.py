"""An allocator that keeps freed memory in the process.

By default the C library returns a large array's pages to the kernel when the array is freed, and the page faults of
getting them back can be most of a layer's time on a CPU. It reads its settings as a process begins.
"""

import os
import sys

SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
}


def keep_pages() -> None:
    """Start this program again under these settings, unless they hold; the processes that it starts have them, too."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)
