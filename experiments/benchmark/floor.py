"""The floor: the fewest bytes that must move, over the bandwidth at which this machine copies an array of that size.

Counted in arrays of x's size, each read or written once by a pass over memory:

* evaluation: x is read, y written: 2.
* forward: x is read for its statistics, which no output can do without, and read again: 3.
* backward: x and the gradient of y are read for two sums, which no entry of dx can do without, and read again; dx is
  written: 5. It comes after the forward pass, as in a network.
* A residual is read once forward. Backward its gradient is written, and if a ReLU follows, on whose sign the residual
  has an influence, it is read with x both times.

An array that fits a cache is copied from there too: the copy is as large as x, so that caches favour neither.
"""

from experiments.benchmark.sizes import Case


def accesses(case: Case, program: str) -> int:
    """Return how many arrays of x's size the program must at least read or write."""
    forward = (2 if program == "evaluation" else 3) + case.residual
    if program != "forward+backward":
        return forward
    return forward + 5 + case.residual * (1 + 2 * case.relu)
