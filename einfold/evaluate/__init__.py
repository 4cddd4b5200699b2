"""Measuring what a compile cost: perplexity, KL, top-1 agreement, recall, bytes."""
