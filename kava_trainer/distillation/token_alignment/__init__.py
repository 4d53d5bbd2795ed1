"""A teacher that reads the text in other tokens than the student: its states at the student's tokens."""
