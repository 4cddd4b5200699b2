"""ShadowKV."""
