"""The embedded pair and data set that the name `quickstart` stands for."""

from pathlib import Path

FOLDER = Path(__file__).parent

TEACHER_FOLDER = FOLDER / "teacher"

STUDENT_FOLDER = FOLDER / "student"
"""A config and the tokenizer, no weights: the student starts from random ones."""

SPLIT_SIZES = {"train": 8_000, "test": 500}

__all__ = ["SPLITS", "SPLIT_SIZES", "STUDENT_FOLDER", "TEACHER_FOLDER", "generate_problems"]
