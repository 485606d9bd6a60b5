"""A module for each claim: estimates by the keys of its criteria, and its figure."""
