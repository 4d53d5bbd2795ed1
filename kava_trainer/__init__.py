"""KAVA: distil a frozen teacher language model into a smaller student by aligning hidden states."""

__version__ = "0.1.0"
