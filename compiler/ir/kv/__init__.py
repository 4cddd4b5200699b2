"""The meaning of packed storages, in torch: how tokens become bytes and bytes become tokens again.

Shape suffixes in this folder:
    B batch, K key/value heads, T tokens, D head size, G granules, R rows and W width of a piece
"""
