"""Formats of checkpoints whose weights are codes, one a file, by the names that they give themselves."""
