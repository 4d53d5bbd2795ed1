"""What a model is worth: its answers, the alignment, and its agreement with the teacher."""
