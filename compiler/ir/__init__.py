"""The intermediate representation: FX graphs over `aten` and `einfold` ops, with their weights."""
