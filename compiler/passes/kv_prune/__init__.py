"""Methods that keep fewer tokens, one a file; each decides the policies of the cache layout."""
