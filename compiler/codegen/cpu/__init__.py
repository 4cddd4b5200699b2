"""Plans in plain torch: as one tile, or through scaled_dot_product_attention where that computes it.

Both are functions of tensors that torch traces, so that what is generated is ATen operators which
Inductor compiles together with their surroundings.
"""
