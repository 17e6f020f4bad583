"""The longest window is what a model's positions allow: one token more fails in transformers itself."""

import inspect

import pytest
import tiny_families
import torch
import transformers as tf

from sparseswaps.models.blocks import max_length

# positions behind the padding token's, behind an offset, in a buffer, of encoder and decoder, from zero on
FAMILIES = (
    "bart", "bert", "bigbird_pegasus", "biogpt", "blenderbot", "camembert", "data2vec-text", "distilbert",
    "electra", "esm", "gpt2", "gpt_neo", "ibert", "led", "lilt", "longformer", "luke", "marian", "mbart",
    "mpnet", "nystromformer", "openai-gpt", "opt", "pegasus", "roberta", "roformer", "xlm", "xlm-roberta",
    "yoso",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_more_than_the_longest_window_fails(family: str) -> None:
    model = tiny_families.build(family, tiny_families.families()[family])
    longest = max_length(model)
    assert longest is not None

    def run(length: int) -> None:
        ids = torch.full((1, length), tiny_families.FIRST_WORD)
        both = (
            {"decoder_input_ids": ids}
            if "decoder_input_ids" in inspect.signature(model.forward).parameters
            else {}
        )
        with torch.no_grad():
            model(input_ids=ids, **both)

    run(longest)
    with pytest.raises((IndexError, RuntimeError)):
        run(longest + 1)


_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_D_MODEL = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (tf.RobertaConfig(**_SMALL, max_position_embeddings=514, pad_token_id=1), 512),
        (tf.XLMRobertaConfig(**_SMALL, max_position_embeddings=514, pad_token_id=1), 512),
        (tf.MPNetConfig(**_SMALL, max_position_embeddings=514, pad_token_id=1), 512),
        (tf.LongformerConfig(**_SMALL, max_position_embeddings=4098, attention_window=[64]), 4096),
        (tf.OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2), 2048),
        (tf.BartConfig(**_D_MODEL, max_position_embeddings=1024), 1024),
        (tf.PegasusConfig(**_D_MODEL, max_position_embeddings=512), 512),
        (
            tf.LEDConfig(
                **_D_MODEL, max_encoder_position_embeddings=16384, max_decoder_position_embeddings=1024
            ),
            1024,
        ),
        (tf.LlamaConfig(**_SMALL, max_position_embeddings=4096), 4096),
        (tf.T5Config(d_model=8, num_layers=1, num_heads=2, d_ff=8), None),
        (tf.BloomConfig(hidden_size=8, n_layer=1, n_head=2), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tf.PretrainedConfig) else str(value),
)
def test_longest_windows_of_published_configurations(
    config: tf.PretrainedConfig, longest: int | None
) -> None:
    with torch.device("meta"):
        assert max_length(tf.AutoModel.from_config(config)) == longest


def test_positions_of_a_vision_tower_do_not_count() -> None:
    config = tiny_families.small_config("clip")
    assert config.vision_config.image_size // config.vision_config.patch_size < tiny_families.POSITIONS
    assert max_length(tf.CLIPModel(config)) == tiny_families.POSITIONS
