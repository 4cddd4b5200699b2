"""Facts about programs that passes and people ask for; nothing here changes a graph."""
