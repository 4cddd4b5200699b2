"""Passes that let a step read few of the tokens that are kept."""
