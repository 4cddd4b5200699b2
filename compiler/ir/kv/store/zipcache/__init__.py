"""ZipCache."""
