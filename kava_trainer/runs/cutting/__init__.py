"""The part of its teacher that a student is, in a run: chosen once, told, and found again by whoever resumes it."""
