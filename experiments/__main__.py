"""The command line: `python -m experiments CONFIG [--out FOLDER] [settings]`; `--help` lists the rest.

`python -m experiments compare RUN...` draws runs together and tabulates them.
"""

import os
import sys

from experiments.interrupt import Interrupt
from experiments.training import processes


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    together = processes.several(arguments)
    if together and processes.WORKER not in os.environ:
        return processes.supervise(arguments)
    # Before the slow imports: Ctrl-C is then understood from the first moment.
    with Interrupt() as interrupt:
        if arguments[:1] == ["compare"]:
            from experiments.training import compare

            return compare.main(arguments[1:])
        from experiments.training import command

        try:
            code = command.main(arguments, interrupt)
        except RuntimeError as error:
            if not together:
                raise
            # A transfer that another process has left; the one that started this one says the rest.
            print("LOST", " ".join(str(error).split()), file=sys.stderr)
            code = processes.LOST
    if together and code:  # the others may never come to the barrier at which JAX waits for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
