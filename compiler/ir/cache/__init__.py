"""What the KV cache holds, where and in how many bytes: layout, policies, storages.

The layout modules need neither torch nor SymPy until an expression is asked for, so that running an
artifact stays light.
"""
