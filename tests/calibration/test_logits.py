"""Logits some tokens at a time are those in one piece, for every family and with everything made of them."""

from __future__ import annotations

import math
from typing import Any

import label_oracle
import pytest
import tiny_models
import torch
import transformers as tf
from precision_watch import Watched

from sparseswaps.calibration import logits as sliced_logits
from sparseswaps.calibration.dense_outputs import DenseOutputs
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.calibration.logits import SlicedModel
from sparseswaps.evaluation.measures import perplexity
from sparseswaps.models.blocks import find_blocks

# Both sides are float32 sums in other orders: about 2e-7 of the result for each of the few dozen terms.
ROUNDING = 1e-5
SHAPE = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Families that change logits after their head, or whose head is not where others have it.
CHANGED: dict[str, tf.PretrainedConfig] = {
    "gemma2": tf.Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=4, final_logit_softcapping=2.0),
    "cohere": tf.CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.25),
    "granite": tf.GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=4.0),
    "phi-bias": tf.PhiConfig(**SHAPE),
    "opt-projected": tf.OPTConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
    ),
    "bert-masked": tf.BertConfig(**SHAPE),
    "roberta-masked": tf.RobertaConfig(**{**SHAPE, "max_position_embeddings": 80}),
}
CAUSAL = (*(x for x in tiny_models.FAMILIES if x not in ("bert", "t5")), "gemma2", "cohere", "granite")
WITH_LOGITS = (*CAUSAL, "t5", "phi-bias", "opt-projected", "bert-masked", "roberta-masked")


def build(family: str) -> Any:
    if family in tiny_models.FAMILIES:
        return tiny_models.build(family)
    torch.manual_seed(0)
    kind = tf.AutoModelForMaskedLM if family.endswith("masked") else tf.AutoModelForCausalLM
    model = kind.from_config(CHANGED[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class MixedLogits(tf.LlamaForCausalLM):
    """Logits of a token depend on those of the tokens before it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.cumsum(1)
        return output


class NoHead(tf.LlamaForCausalLM):
    """Makes logits and names no head."""

    def get_output_embeddings(self) -> None:
        return None


def whole(kind: type[tf.LlamaForCausalLM]) -> Any:
    model = tiny_models.build("llama")
    other = kind(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of five tokens, which windows of 12 are no multiple of."""
    monkeypatch.setattr(sliced_logits, "SLICE_ENTRIES", 5 * tiny_models.VOCABULARY)


def windows() -> torch.Tensor:
    return tiny_models.tokens(7 * 12).view(7, 12)


def inputs_of(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder_decoder = model.config.is_encoder_decoder
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if encoder_decoder else {})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", WITH_LOGITS)
def test_logits_in_slices_are_those_in_one_piece(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = model(**inputs_of(model, windows())).logits.flatten(0, 1)
        sliced = SlicedModel(model, windows())
        assert sliced.sliced
        outputs = sliced.run(windows())
        parts = list(outputs.each(lambda logits, _: logits))
    assert len(parts) == math.ceil(7 * 12 / 5)
    assert outputs.output is None
    tolerance = ROUNDING * float(expected.abs().max())
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_is_the_protocols(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        logits = model(input_ids=windows()).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, windows()[:, 1:, None])[..., 0]
    expected = math.exp(-float(chosen.mean(1).mean()))
    assert perplexity(model, windows()) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [MixedLogits, NoHead])
def test_logits_that_slices_would_change_are_made_whole(
    kind: type[tf.LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole(kind)
    sliced = SlicedModel(model, windows())
    assert not sliced.sliced
    assert sliced.batch_size(12, 4) == 4
    monkeypatch.setattr(sliced_logits, "WHOLE_ENTRIES", 2 * 12 * tiny_models.VOCABULARY)
    assert sliced.batch_size(12, 4) == 2
    with torch.no_grad():
        logits = model(input_ids=windows()).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(2, windows()[:, 1:, None])[..., 0]
    expected = math.exp(-float(chosen.mean(1).mean()))
    assert perplexity(model, windows()) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", WITH_LOGITS)
def test_gradients_in_slices_are_those_in_one_piece(family: str) -> None:
    model = build(family)
    blocks = find_blocks(model)
    moments: dict[str, torch.Tensor] = {}
    layers = [layer for block in blocks for layer in block.layers if layer.expert is None]
    hooks = [
        layer.module.register_full_backward_hook(
            lambda _m, _i, out, name=layer.name: moments.__setitem__(name, out[0].flatten(0, -2))
        )
        for layer in layers
    ]
    logits = model(**inputs_of(model, windows())).logits
    labels = label_oracle.labels(logits, seed=3)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = gradient_moments(model, blocks, windows(), batch_size=3, seed=3)
    assert set(found) <= set(moments)
    assert found
    for name, moment in found.items():
        expected = moments[name].T @ moments[name]
        tolerance = 10 * ROUNDING * float(expected.abs().max())  # two gradients through all layers
        torch.testing.assert_close(moment, expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", [*WITH_LOGITS, "mixed"])
def test_divergence_and_its_gradient_are_those_in_one_piece(family: str) -> None:
    model = whole(MixedLogits) if family == "mixed" else build(family)
    with torch.no_grad():
        dense = model(**inputs_of(model, windows())).logits.log_softmax(-1)
    outputs = DenseOutputs(model, windows(), 7)
    layer = find_blocks(model)[0].layers[0]
    layer.write(layer.weight * 0.9)
    parameter = getattr(layer.module, layer.parameter)
    now = model(**inputs_of(model, windows())).logits.log_softmax(-1)
    expected = torch.nn.functional.kl_div(now, dense, reduction="sum", log_target=True)
    (slope,) = torch.autograd.grad(expected, parameter)
    found = outputs.loss(model, 0)
    (found_slope,) = torch.autograd.grad(found, parameter)
    # a difference of logarithms of size 1 that leaves about 1e-2
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=100 * ROUNDING)
    torch.testing.assert_close(found_slope, slope, rtol=0, atol=100 * ROUNDING * float(slope.abs().max()))


def test_choices_rest_on_a_loss_in_full_precision() -> None:
    """The model's own forward is in the precision that torch is told, where nothing is chosen by it."""
    model = tiny_models.build("llama")
    torch.set_float32_matmul_precision("high")
    try:
        with Watched() as watched:
            DenseOutputs(model, windows(), 7).total(model)
        assert set(watched.seen) == {("ieee", "ieee")}
        with Watched() as watched, torch.no_grad():
            model(input_ids=windows())
        assert ("ieee", "ieee") not in watched.seen
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"


def test_encoders_without_logits_just_run() -> None:
    model = tiny_models.build("bert")
    sliced = SlicedModel(model, windows())
    outputs = sliced.run(windows())
    assert outputs.values is None
    assert torch.equal(outputs.output.last_hidden_state, model(input_ids=windows()).last_hidden_state)
    with pytest.raises(ValueError, match="expected logits, found none"):
        outputs.total(lambda logits, _: logits.sum())
