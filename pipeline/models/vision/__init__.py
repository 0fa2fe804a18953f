"""Image towers, one file a kind."""
