"""Passes that make a graph smaller and change no number."""
