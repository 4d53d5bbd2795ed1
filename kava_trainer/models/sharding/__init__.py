"""Models whose weights are spread over the ranks, which gather them block by block."""
