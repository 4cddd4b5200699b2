"""Weight formats as data: what a weight is stored as, and everything that follows from it."""
