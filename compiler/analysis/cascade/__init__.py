"""What is known about a cascade: how many passes it takes, and how it folds to fewer."""
