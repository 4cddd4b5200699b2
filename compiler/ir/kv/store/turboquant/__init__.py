"""TurboQuant."""
