"""The answers that a student writes itself while it is trained, and that its teacher corrects."""
