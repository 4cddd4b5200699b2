"""What the KV cache holds, where and in how many bytes: the layout, and what stays, how and read how.

Layout, policies and storages need neither torch nor SymPy until an expression is asked for, so that running
an artifact stays light; what a storage's bytes mean stands beside it in torch.
"""
