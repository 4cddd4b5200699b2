"""How the codes of a scheme are decoded in a kernel, a file a scheme."""
