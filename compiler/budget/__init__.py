"""What is worth its bytes: how much a model loses by each choice, and which choices a budget allows."""
