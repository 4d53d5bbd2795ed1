"""One text in the tokens of two models: which of the teacher's tokens stand for the text of each of the student's."""
