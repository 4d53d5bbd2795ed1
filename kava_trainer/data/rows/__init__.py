"""From one row to one example: what a chat template makes of it, which tokens are learned, and what is to be told."""
