"""FX graphs as cascades: what each operator computes, followed by dataflow.

Every dimension is a product of ranks. Ranks become one because an operator walks them together, never
because their sizes happen to agree, and a dimension is cut into ranks where a reshape does.
"""
