"""The student's own answers in a training: when they are written, what is kept of them, and what they give away."""
