"""Numbers as codes of a few bits, in torch.

Shape suffixes in this folder, and in the codecs of storages:
    B batch, K key/value heads, T tokens, D head size, G granules, R rows and W width of a piece
"""
