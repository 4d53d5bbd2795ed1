"""Models whose weights are spread over the ranks, with torch's `fully_shard`."""
