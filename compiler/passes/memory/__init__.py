"""Passes that lower the peak of live intermediate values."""
