"""Models as writers of text."""
