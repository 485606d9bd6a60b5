"""Find the `seq_lengths` of a flax `RNN` from inside its cell.

Flax calls `cell.num_feature_axes`, then `cell.initialize_carry(key, input_shape)`, then the cell, and gives the lengths
to none of them: it computes over the padding and selects the outputs afterwards. Batch statistics cannot be corrected
afterwards, so the cell must know the lengths before its first step. Neither RNN has a hook for it: the parent module in
linen holds fields but no arguments of a call, an interceptor must be installed by the caller, and an `RNN` of our own
would leave flax's silently wrong. So they are read where they are, in the frame of `RNN.__call__`, in this file alone.
If flax renames its variables, tests/flax/test_lengths.py fails.
"""

import inspect
import sys
from typing import Any

from jaxbn.lstm._state import LSTMCarry


def find_rnn_lengths(rnn: Any) -> Any:
    """Return the `seq_lengths` given to the call of `rnn`, a class of flax's, that is under way; None without one.

    Refuses an `initial_carry` that does not know the lengths.
    """
    code, frame = inspect.unwrap(rnn.__call__).__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    lengths, carry = frame.f_locals.get("seq_lengths"), frame.f_locals.get("initial_carry")
    if lengths is not None and isinstance(carry, LSTMCarry) and carry.lengths is None:
        raise ValueError(
            "`initial_carry` must know the lengths where `seq_lengths` is given, or padding would enter the "
            "statistics. Make it by `cell.initialize_carry(..., lengths=seq_lengths)`."
        )
    return lengths
