"""Batch normalization: moments, normalization and its derivative, running statistics."""
