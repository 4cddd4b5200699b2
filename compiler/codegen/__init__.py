"""Code generation: from a program to what a target runs."""
