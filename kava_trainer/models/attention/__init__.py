"""What attention reads and keeps: queries, keys and values of chosen layers, as they go into it."""
