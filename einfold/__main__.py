"""`python -m einfold` is the command line."""

from .cli import main

main()
