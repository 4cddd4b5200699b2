"""Extended einsum cascades: attention and its relatives as statements over named ranks.

After FuseMax (Nayak et al., 2024, section 2): a cascade is a list of statements, each a map over
the points of some ranks followed by a reduction over others. Nothing here needs torch.
"""
