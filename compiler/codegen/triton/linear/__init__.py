"""Products with stored weights as Triton kernels: what `--target triton` runs in place of widening a weight.

program -> kinds          each scheme, type and bias that products differ in (`kinds.py`)
        -> source         one text for all schemes; a scheme brings how its codes are decoded (`decoders/`)
        -> weights        the pieces in the order that kernels load them, when they are loaded (`layout.py`)
        -> bound          in place of the operator (`bound.py`)
"""
