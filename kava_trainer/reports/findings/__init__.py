"""What a verdict rests on beside the answers: the course of the alignment, and the language that was kept."""
