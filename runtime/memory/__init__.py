"""Weights that are not in memory: files read past the page cache, ahead of what computes with them."""
