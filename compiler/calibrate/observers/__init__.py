"""Observers: what a model shows on a little text, one statistic a file."""
