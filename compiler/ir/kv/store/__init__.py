"""Storages: how the tokens that a group keeps are stored, one a folder."""
