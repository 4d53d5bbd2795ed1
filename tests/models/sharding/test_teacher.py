"""A teacher that is loaded by shards: what each rank holds of it, and what it gives."""
