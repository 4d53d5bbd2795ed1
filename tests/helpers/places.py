"""Where things are: the checkout, and real models and data beside it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHARED = ROOT.parent / "shared"


def shared_path(*parts: str) -> Path:
    """A folder of real models or data beside the checkout; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path
