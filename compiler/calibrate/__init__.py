"""Statistics that a model shows on a little text, for the passes that decide by them."""
