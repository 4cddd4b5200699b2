"""Quantization of the KV cache, one method a file."""
