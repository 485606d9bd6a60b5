"""A module for each claim: train, and return the numbers of every seed."""
