"""The packer, from the environment that `make thinker-env` makes."""

import sys
from pathlib import Path

import pytest

PACKER = Path(__file__).parents[2] / ".venv-thinker" / "bin" / "tpacker"


@pytest.fixture(scope="session")
def packer() -> Path:
    if not PACKER.is_file():
        found = f"{sys.version_info.major}.{sys.version_info.minor}"
        pytest.skip(
            "thinker's packer is not installed: `make thinker-env` needs the package index and "
            f"Python 3.10 or 3.11 (these tests run in {found})"
        )
    return PACKER
