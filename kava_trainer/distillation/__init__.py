"""What the project exists for: targets, projectors, loss terms, and the teacher's states on disk."""
