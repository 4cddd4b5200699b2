"""GEAR."""
