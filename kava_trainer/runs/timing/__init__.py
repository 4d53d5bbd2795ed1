"""What the passes of a run take."""
