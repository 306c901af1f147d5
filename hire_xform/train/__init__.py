"""Training with a top-k in the feed-forward blocks."""
