"""Mustafar."""
