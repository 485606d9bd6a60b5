"""Early ends of a program: by Ctrl-C or SIGTERM, taken as a wish to stop soon, or by an error of one line."""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a cluster's scheduler sends the second
INTERRUPTED, REFUSED = 130, 2  # what a shell reports for Ctrl-C, and for a wrong command line


def refuse(error: Exception) -> int:
    """Print the error as one line; return the exit code."""
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return REFUSED


class Interrupt:
    """Set `requested` at the first Ctrl-C or SIGTERM while it is entered; end the process at the second.

    An exception could strike anywhere: inside a compiled loop, or between two files that belong together. A flag is
    looked at where stopping is safe. For the same reason the second one unwinds nothing: what is on disk is whole.
    """

    requested = False

    def __enter__(self) -> "Interrupt":
        """Listen."""
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
            os._exit(INTERRUPTED)
        self.requested = True
        os.write(2, b"\nStopping after this chunk of steps; press Ctrl-C again to stop at once.\n")
