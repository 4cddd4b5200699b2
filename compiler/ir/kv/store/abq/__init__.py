"""Accurate Block Quantization."""
