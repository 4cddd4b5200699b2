"""MiKV."""
