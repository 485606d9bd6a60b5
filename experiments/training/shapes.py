"""Names for the arrays that the experiments pass around; their shapes are checked in the tests."""

import numpy as np
from jaxtyping import Array, Float, Int, PyTree

Tree = PyTree[Array]
Scalar = Float[Array, ""]
Count = Int[Array | np.ndarray, ""]
Images = Float[Array | np.ndarray, "batch pixels"]
Labels = Int[Array | np.ndarray, " batch"] | Float[Array | np.ndarray, "batch outputs"]
PerExample = Float[Array, " batch"]
Logits = Float[Array, "batch outputs"]
PerRun = Float[Array | np.ndarray, "seeds rates"]
Logged = Float[np.ndarray, " logged"]
LoggedBySeed = Float[np.ndarray, "seeds logged"]
Values = Float[np.ndarray, "n *rest"]
