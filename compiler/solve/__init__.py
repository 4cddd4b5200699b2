"""Solvers: what a weight is rounded to, one a file."""
