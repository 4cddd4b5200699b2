"""Passes that find what ATen spells out and raise it to one `einfold` operator."""
