"""Methods by which layers share what they cache, or cache fewer channels, one a file."""
