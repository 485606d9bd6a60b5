"""Recurrent batch normalization: an LSTM with statistics for each time step."""

from jaxbn.lstm._apply import lstm_apply as lstm_apply
from jaxbn.lstm._apply import lstm_step as lstm_step
from jaxbn.lstm._state import LSTMCarry as LSTMCarry
from jaxbn.lstm._state import LSTMParams as LSTMParams
from jaxbn.lstm._state import LSTMState as LSTMState
from jaxbn.lstm._state import lstm_carry as lstm_carry
from jaxbn.lstm._state import lstm_init as lstm_init
