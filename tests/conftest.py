"""Shared fixtures: everything offline, one thread, the test material beside the checkout."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# the same examples at every run; numba compiles during the first one, so no deadline
settings.register_profile(
    "sparseswaps", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sparseswaps")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models and texts that are not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"test material not found: expected {path}")
    return path
