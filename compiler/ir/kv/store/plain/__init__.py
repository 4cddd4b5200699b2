"""Numbers of one type."""
