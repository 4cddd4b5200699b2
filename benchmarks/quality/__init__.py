"""What compression costs on trained models: `python -m benchmarks.quality`, see `__main__`."""
