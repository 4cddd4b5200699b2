"""KIVI."""
