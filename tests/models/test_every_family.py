"""Families of every kind go through the whole, with the default search and drift.

``walk_families.py`` walks all of them, with Wanda, and writes the page.
"""

import re
from pathlib import Path

import pytest
import tiny_families
import walk_families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# of each kind: decoders, mixtures, states instead of attention, encoders, both, images, sound, several inputs
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "falcon", "bloom", "mpt",
    "gpt_neox", "gptj", "olmo2", "starcoder2", "gpt_oss", "qwen3_moe", "deepseek_v3", "glm4_moe",
    "hunyuan_v1_dense", "mamba", "rwkv", "nemotron_h", "gemma4_unified_text", "bert", "roberta",
    "xlm-roberta", "mpnet", "longformer", "deberta-v2", "electra", "albert", "modernbert", "esm", "t5",
    "bart", "pegasus", "pegasus_x", "marian", "switch_transformers", "vit", "swin", "dinov2", "dinov3_vit",
    "segformer", "vit_mae", "mgp-str", "whisper", "wav2vec2", "hubert", "audio-spectrogram-transformer",
    "speecht5", "clip", "siglip", "llava", "qwen2_vl", "dpr", "llama4_text", "t5gemma2", "tipsv2",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_saved_reloaded_and_measured_by_plain_transformers(family: str, tmp_path: Path) -> None:
    found = walk_families.walk(family, tiny_families.families()[family], tmp_path, "one-swap")
    assert found.result == "pruned", found
    # what the page says of it
    layers, measure = found.detail.split(" layers, ")
    row = f"| {family} | `{found.model}` | {found.inputs} | {layers} | {measure} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), row


def test_the_page_says_nothing_of_wrong_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "## Wrong" not in text
    pruned = text.split("## Pruned")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| [^f|-][^|]* \|", pruned, re.MULTILINE)) > 300
    assert len(FAMILIES) >= 40
