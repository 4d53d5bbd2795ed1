"""Teacher and student of a run, and what of the one the other is made of."""
