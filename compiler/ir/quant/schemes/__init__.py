"""Schemes, one a file, with the names by which recipes know them."""
