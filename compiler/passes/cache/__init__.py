"""Passes over the KV cache; they meet in the CacheLayout."""
