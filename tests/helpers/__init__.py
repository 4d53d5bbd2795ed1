"""Makers, processes and stand-ins that several tests share, by subject.

What the libraries read of the environment as they are imported is set here, before any of them is.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("TRANSFORMERS_VERBOSITY", None)  # Trainer's progress bars depend on it
