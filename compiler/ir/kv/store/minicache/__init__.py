"""MiniCache."""
