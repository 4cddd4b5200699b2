"""Passes over programs, one method a file, in a folder per family. `base` says what a pass is."""
