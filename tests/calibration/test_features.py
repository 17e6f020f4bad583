"""Models that take no tokens: inputs from files, checked before weights are loaded, measured by name."""

import re
import sys
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import tiny_families
import tiny_models
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration.logits import logits_of
from sparseswaps.calibration.windows import Windows, calibration_windows, evaluation_windows, for_model
from sparseswaps.models import loading
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.inputs import ModelInputs, forward_inputs, joined
from sparseswaps.models.loading import load_model
from sparseswaps.models.outputs import OF_ENCODER, output_states
from sparseswaps.pruning.pipeline import layer_problems

COUNT = 8


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(seed))


def ids(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        tiny_families.FIRST_WORD, tiny_families.VOCABULARY, (COUNT, length), generator=generator
    )


PIXELS = (3, tiny_families.IMAGE, tiny_families.IMAGE)
INPUTS: dict[str, dict[str, Tensor]] = {
    "vit": {"pixel_values": values(*PIXELS)},
    "clip": {"pixel_values": values(*PIXELS), "input_ids": ids(12)},
    "whisper": {
        "input_features": values(16, 2 * tiny_families.POSITIONS),
        "decoder_input_ids": ids(6),
    },
    "wav2vec2": {"input_values": values(4000)},
    "bert": {"input_ids": ids(16), "attention_mask": torch.ones(COUNT, 16, dtype=torch.int64)},
}
WIDTH = tiny_families.WIDTH


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a family with its inputs; gives the directory, the file and the model."""

    def make(family: str) -> tuple[Path, Path, tf.PreTrainedModel]:
        model = tiny_families.build(family, tiny_families.families()[family])
        model.save_pretrained(tmp_path / family)
        save_file(INPUTS[family], tmp_path / f"{family}.safetensors")
        return tmp_path / family, tmp_path / f"{family}.safetensors", model

    return make


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"objective": "drift=0.5,residual=0.5,metric"}),
        ("vit", {"objective": "drift=auto"}),
        ("clip", {"objective": "metric", "solver": "wanda"}),
        ("whisper", {"allocation": "knapsack", "solver": "wanda"}),
        ("wav2vec2", {"mode": "one-shot"}),
        ("bert", {}),
    ],
)
def test_prune_and_measure(
    family: str, options: dict[str, Any], offload: bool, saved: Any, tmp_path: Path
) -> None:
    """Every stage runs on inputs of any kind; the cosine is that of the outputs of both models."""
    source, file, dense = saved(family)
    report = ss.prune(
        source, "0.5", calibration=file, evaluation=file, samples=COUNT, offload=offload,
        out=tmp_path / "out", **options,
    )  # fmt: skip
    assert report.settings.length is None
    assert report.perplexity_pruned is None
    assert report.evaluation_windows == COUNT
    pruned = type(dense).from_pretrained(tmp_path / "out").eval()
    expected = {
        "vit": "last_hidden_state",
        "clip": "text_embeds and image_embeds",
        "whisper": "encoder_last_hidden_state",
        "wav2vec2": "last_hidden_state",
        "bert": "last_hidden_state",
    }[family]
    assert report.compared == expected
    cosines = []
    with torch.no_grad():
        one, other = (model.base_model(**INPUTS[family]) for model in (dense, pruned))
    for name in expected.split(" and "):
        a, b = (x[name] if x[name].ndim == 2 else x[name].mean(1) for x in (one, other))
        cosines.append(nn.functional.cosine_similarity(a, b, dim=-1))
    assert report.cosine == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    found = ss.evaluate(tmp_path / "out", file, reference=source, offload=offload)
    assert found.cosine == pytest.approx(report.cosine, abs=1e-6)
    assert (found.compared, found.length, found.perplexity) == (expected, None, None)


def test_refinement_brings_outputs_nearer(saved: Any) -> None:
    source, file, _ = saved("clip")
    report = ss.prune(source, "0.5", calibration=file, samples=COUNT, solver="wanda", refine=1)
    assert report.loss is not None
    assert report.loss_start is not None
    assert report.loss < report.loss_start


def test_gram_matrices_are_of_all_samples(saved: Any) -> None:
    source, file, model = saved("vit")
    loaded = load_model(source)
    windows = for_model(calibration_windows(file, None, COUNT, None), loaded)
    layer = find_blocks(model)[1].layers[0]
    seen: list[Tensor] = []
    handle = layer.module.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].double().flatten(0, -2))
    )
    with torch.no_grad():
        model(**INPUTS["vit"])
    handle.remove()
    problems = {
        p.name: p for p in layer_problems(loaded.model, find_blocks(loaded.model), "0.5", windows.tokens)
    }
    gram = problems[layer.name].gram
    patches = 1 + (tiny_families.IMAGE // model.config.patch_size) ** 2
    assert windows.length == patches
    assert gram.tokens == len(seen[0]) == COUNT * patches
    torch.testing.assert_close(gram.matrix, seen[0].T @ seen[0], rtol=1e-5, atol=1e-4)


def test_tokens_are_the_same_as_inputs_and_as_windows(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "llama")
    tokens = tiny_models.tokens(8 * 32).view(8, 32)
    save_file({"input_ids": tokens}, tmp_path / "tokens.safetensors")
    folders = []
    for number, text in enumerate((Windows(tokens, "tokens", 8), tmp_path / "tokens.safetensors")):
        folders.append(tmp_path / str(number))
        ss.prune(source, "0.5", calibration=text, samples=8, objective="drift=0.5", out=folders[-1])
    one, other = (ss.load_masks(folder).masks for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_main_input_alone_and_a_choice_of_samples(saved: Any, tmp_path: Path) -> None:
    """A float array is the main input; calibration chooses with its seed, evaluation takes the first."""
    source, file, _ = saved("vit")
    np.save(tmp_path / "pixels.npy", INPUTS["vit"]["pixel_values"].numpy())
    loaded = load_model(source, weights=False)
    for seed in (0, 1):
        array, tensors = (
            for_model(calibration_windows(each, None, 3, None, seed), loaded)
            for each in (tmp_path / "pixels.npy", file)
        )
        assert array.hash == tensors.hash
        assert len(array) == 3
        rows = array.tokens.tensors["pixel_values"]  # type: ignore[union-attr]
        every = INPUTS["vit"]["pixel_values"]
        places = [next(i for i in range(COUNT) if torch.equal(every[i], row)) for row in rows]
        assert places == sorted(set(places))
    first = evaluation_windows(file, None, None, 2).tokens
    assert isinstance(first, ModelInputs)
    assert torch.equal(first.tensors["pixel_values"], INPUTS["vit"]["pixel_values"][:2])
    with pytest.warns(UserWarning, match=r"expected 9 samples, found 8: all are used"):
        calibration_windows(file, None, 9, None)


def broken(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "vit",
            {"pixel_values": values(3, 16)},
            r"expected what ViTForImageClassification takes, found pixel_val",
        ),
        ("vit", {"pixel_values": values(3, 20, 20)}, r"size \(20\*20\)"),
        (
            "vit",
            {"pixel_values": torch.ones(COUNT, *PIXELS, dtype=torch.uint8)},
            "floating-point .* found torch.uint8",
        ),
        ("vit", {"pixel_valuse": values(*PIXELS)}, "expected arguments of ViTForImageClassification.forward"),
        ("vit", {"pixel_values": values(*PIXELS) / 0}, "pixel_values: expected finite values"),
        ("vit", {}, "found no tensor"),
        ("vit", {"pixel_values": torch.ones(0, *PIXELS)}, r"a sample in each, found pixel_values \(0, 3"),
        ("clip", {"pixel_values": values(*PIXELS)}, r"CLIPModel takes.*input_ids"),
        (
            "clip",
            {"pixel_values": values(*PIXELS), "input_ids": ids(12)[:3]},
            r"as many rows.*input_ids \(3, 12\)",
        ),
        (
            "clip",
            {"pixel_values": values(*PIXELS), "input_ids": ids(12) + 99},
            "input_ids of .* the vocabulary",
        ),
        (
            "clip",
            {"pixel_values": values(*PIXELS), "input_ids": ids(99)},
            r"less than max_position_embeddings",
        ),
        ("whisper", {"input_features": values(16, 96)}, "decoder_input_ids"),
        (
            "whisper",
            {**INPUTS["whisper"], "input_features": values(16, 90)},
            "mel input features to be of length",
        ),
        ("wav2vec2", {"input_values": values(3)}, "expected a forward pass on the first sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_cannot_be_used(
    family: str, change: dict[str, Tensor], message: str, saved: Any, tmp_path: Path
) -> None:
    source, _, _ = saved(family)
    file = broken(tmp_path / "broken.safetensors", change)
    with pytest.raises(ss.InputError, match=message) as caught:
        ss.prune(source, "0.5", calibration=file, samples=COUNT, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"not a file of tensors", "expected a safetensors file"),
        ("x.safetensors", None, "found no such file"),
        ("x.npy", b"\x93NUMPY", "expected a NumPy array"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes | None, message: str, saved: Any, tmp_path: Path
) -> None:
    source, _, _ = saved("bert")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ss.InputError, match=message):
        ss.prune(source, "0.5", calibration=tmp_path / name, samples=2)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "vit",
            r"takes pixel_values and no tokens: a \.safetensors file .* a float \.npy file of pixel_values",
        ),
        ("clip", r"takes pixel_values beside tokens: a \.safetensors file"),
        ("whisper", r"takes input_features and no tokens"),
        ("wav2vec2", r"takes input_values and no tokens"),
    ],
)
def test_text_for_a_model_without_tokens_is_refused_before_its_weights_are_loaded(
    family: str, expected: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, _ = saved(family)
    (tmp_path / "text.txt").write_text("some words")
    real = loading.load_model

    def shapes_alone(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["weights"] is False
        return real(*args, **kwargs)

    monkeypatch.setattr(sys.modules["sparseswaps.pruning.inputs"], "load_model", shapes_alone)
    with pytest.raises(ss.InvalidTextError, match=expected) as caught:
        ss.prune(source, "0.5", calibration=tmp_path / "text.txt", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_several_kinds_of_inputs_takes_text_alone_where_it_can(tmp_path: Path) -> None:
    model = tiny_families.build("llava", "LlavaForConditionalGeneration")
    model.save_pretrained(tmp_path / "llava")
    np.save(tmp_path / "tokens.npy", ids(16).numpy())
    report = ss.prune(
        tmp_path / "llava", "0.5", calibration=tmp_path / "tokens.npy", evaluation=tmp_path / "tokens.npy",
        samples=4, length=16, solver="wanda", include=("*language_model*",),
    )  # fmt: skip
    assert report.perplexity_pruned is not None


def test_length_counts_tokens(saved: Any) -> None:
    source, file, _ = saved("vit")
    with pytest.raises(
        ss.InvalidTextError, match="expected none beside inputs that are no text, found 32 tokens"
    ):
        ss.prune(source, "0.5", calibration=file, length=32)


def test_language_models_on_inputs_need_a_reference(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "llama")
    file = broken(tmp_path / "tokens.safetensors", {"input_ids": tiny_models.tokens(64).view(4, 16)})
    with pytest.raises(ss.InputError, match="no text is given: expected --reference"):
        ss.evaluate(source, file)


def test_what_is_masked_is_told(saved: Any, tmp_path: Path) -> None:
    source, _, _ = saved("bert")
    mask = INPUTS["bert"]["attention_mask"].clone()
    mask[:, -3:] = 0
    file = broken(tmp_path / "padded.safetensors", {**INPUTS["bert"], "attention_mask": mask})
    with pytest.warns(UserWarning, match="attention_mask leaves positions out"):
        ss.prune(source, "0.5", calibration=file, samples=COUNT, solver="wanda")


def test_outputs_that_are_drawn_at_random_are_refused(tmp_path: Path) -> None:
    """A masked autoencoder draws what it masks, unless it is given."""
    tiny_families.build("vit_mae", "ViTMAEModel").save_pretrained(tmp_path / "mae")
    file = broken(tmp_path / "pixels.safetensors", {"pixel_values": values(*PIXELS)})
    with pytest.raises(ss.InvalidModelError, match="expected the same output twice"):
        ss.prune(tmp_path / "mae", "0.5", calibration=file, samples=COUNT, solver="wanda")
    noise = torch.rand(COUNT, 64, generator=torch.Generator().manual_seed(2))
    file = broken(tmp_path / "both.safetensors", {"pixel_values": values(*PIXELS), "noise": noise})
    assert ss.prune(tmp_path / "mae", "0.5", calibration=file, samples=COUNT, solver="wanda").sparsity == 0.5


def test_a_model_without_files_of_a_tokenizer_has_none(saved: Any, tmp_path: Path) -> None:
    """Transformers makes one without words, which would read every text as unknown tokens."""
    source, _, _ = saved("bert")
    assert load_model(source, weights=False).tokenizer is None
    (tmp_path / "text.txt").write_text("some words " * 200)
    with pytest.raises(ss.InvalidTextError, match="expected a tokenizer beside the model, found none"):
        ss.prune(source, "0.5", calibration=tmp_path / "text.txt", samples=2)


def test_inputs_behave_as_windows_do() -> None:
    inputs = ModelInputs({"a": torch.arange(10).view(5, 2), "b": torch.arange(5.0)}, positions=7)
    assert (len(inputs), inputs.shape, inputs.numel()) == (5, (5, 7), 35)
    parts = inputs.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    again = joined(parts)
    assert isinstance(again, ModelInputs)
    assert again.positions == 7
    assert all(torch.equal(again.tensors[name], inputs.tensors[name]) for name in "ab")
    chosen = inputs[torch.tensor([True, False, True, False, False])]
    assert chosen.tensors["b"].tolist() == [0.0, 2.0]
    same = torch.equal(joined(torch.arange(6).view(3, 2).split(2)), torch.arange(6).view(3, 2))  # type: ignore[arg-type]
    assert same


def test_inputs_get_the_dtype_of_the_weights() -> None:
    model = tiny_families.build("vit", "ViTModel").to(torch.bfloat16)
    inputs = forward_inputs(model, ModelInputs({"pixel_values": values(*PIXELS), "ids": ids(3)}))
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["ids"].dtype == torch.int64
    assert "use_cache" not in inputs


def test_states_of_outputs() -> None:
    output = tf.modeling_outputs.ModelOutput
    hidden, encoder = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    both = output(last_hidden_state=hidden, encoder_last_hidden_state=encoder)
    assert output_states(both)[0] == "last_hidden_state"
    assert output_states(both, OF_ENCODER)[0] == "encoder_last_hidden_state"
    name, states = output_states(output(last_hidden_state=torch.rand(2, 4, 3, 5)))
    assert states.shape == (2, 15, 4)
    embeds = output(
        logits_per_image=torch.rand(2, 2), image_embeds=torch.rand(2, 4), text_embeds=torch.rand(2, 4)
    )
    name, states = output_states(embeds)
    assert (name, states.shape) == ("image_embeds and text_embeds", (2, 1, 8))
    torch.testing.assert_close(states[:, 0, :4].norm(dim=-1), torch.ones(2))
    assert output_states(output(loss=torch.tensor(1.0), logits=torch.rand(2, 9)))[0] == "logits"
    assert output_states(output(boxes=torch.rand(2, 3, 4)))[0] == "boxes"
    with pytest.raises(ss.InvalidModelError, match="hidden states, embeddings or logits, found tuple"):
        output_states((hidden,))


def test_logits_of_samples_have_one_position() -> None:
    output = tf.modeling_outputs.ModelOutput
    found = logits_of(output(logits=torch.rand(2, 5)))
    assert found is not None
    assert found.shape == (2, 1, 5)
    assert logits_of(output(logits=torch.rand(2, 1))) is None  # a single class is no choice
    assert logits_of(output(logits=torch.rand(2, 3, 4, 4))) is None


def test_the_command_line_names_what_is_compared(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, file, _ = saved("vit")
    given = ["--solver", "wanda", "--samples", "8", "--calibration", str(file), "--evaluation", str(file)]
    assert command_line.run("prune", source, *given) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "to the dense model's last_hidden_state, mean-pooled (8 samples)" in said
