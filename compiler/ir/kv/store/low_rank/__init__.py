"""CSKV's features."""
