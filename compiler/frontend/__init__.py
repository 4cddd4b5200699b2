"""From a model to a program: loading, the hooks that keep attention whole, and capture."""
