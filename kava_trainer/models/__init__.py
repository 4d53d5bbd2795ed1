"""Teacher and student as models: loaded, read layer by layer, packed, with adapters."""
