"""Passes that make one operator of several, so that weights are read once and kernels are few."""
