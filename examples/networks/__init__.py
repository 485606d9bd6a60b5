"""ResNets for small and for large images, in linen, nnx and PyTorch, with the same names of layers."""
