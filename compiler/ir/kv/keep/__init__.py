"""Policies: which tokens a group of KV heads keeps."""
