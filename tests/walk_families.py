"""Every family of transformers that can be built tiny goes through prune, save and reload, and is checked.

``python tests/walk_families.py`` walks all of them and writes ``docs/families.md``; the tests walk some.
Plain transformers judges: the pruned model is read back with the class that its configuration names, its
weights are the dense ones where the masks keep them and zero elsewhere, and its perplexity, or the cosine of
its outputs to the dense model's, is that of the report.
"""

from __future__ import annotations

import collections
import inspect
import math
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_families
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.masks import MaskFile
from sparseswaps.models.blocks import find_blocks, max_length

SAMPLES, LENGTH, SECONDS = 8, 32, 60


@dataclass(frozen=True)
class Walked:
    """What became of a family.

    Attributes:
        family: its model type; model: the class that stands for it; inputs: what it was given.
        result: pruned, refused, not built, not run or wrong; detail: what of, or why.
    """

    family: str
    model: str
    inputs: str
    result: str
    detail: str


def walk(family: str, name: str, folder: Path, solver: str = "wanda") -> Walked:
    """Prune a tiny model of the family and check what comes of it.

    Args:
        family: model type.
        name: the class that stands for it.
        folder: an empty one.
        solver: chooses the masks.

    Raises:
        AssertionError: if something is wrong.
    """
    with warnings.catch_warnings():  # whatever families warn of
        warnings.simplefilter("ignore")
        return _walk(family, name, folder, solver)


def _walk(family: str, name: str, folder: Path, solver: str) -> Walked:
    try:
        model = tiny_families.build(family, name)
    except Exception as error:  # whatever transformers raises for a configuration, a library that is missing
        return Walked(family, name, "", "not built", _told(error))
    try:
        kind, inputs = inputs_of(model)
    except ValueError as error:
        return Walked(family, name, "", "not run", str(error))
    model.save_pretrained(folder / "dense")
    if not _reads_what_it_writes(model, folder):
        return Walked(family, name, kind, "not run", "transformers does not read back what it saves")
    del model
    source: Any = folder / "inputs.safetensors"
    if kind == "tokens":
        source = ss.Windows(inputs["input_ids"], "random tokens", SAMPLES)
    else:
        save_file(inputs, source)
    try:
        report = ss.prune(
            folder / "dense",
            "0.5",
            solver=solver,
            calibration=source,
            evaluation=source,
            samples=SAMPLES,
            out=folder / "pruned",
        )
    except ss.InputError as error:
        return Walked(family, name, kind, "refused", str(error).replace(str(folder), "."))
    dense = getattr(tf, name).from_pretrained(folder / "dense").eval()
    pruned = getattr(tf, name).from_pretrained(folder / "pruned").eval()
    check_weights(dense, pruned, ss.load_masks(folder / "pruned"), report)
    measure = check_quality(dense, pruned, inputs, report)
    return Walked(family, name, kind, "pruned", f"{len(report.layers)} layers, {measure}")


def _reads_what_it_writes(model: tf.PreTrainedModel, folder: Path) -> bool:
    """Whether transformers saves and reads the model in ``dense`` without changing it."""
    read = type(model).from_pretrained(folder / "dense")
    read.save_pretrained(folder / "again")
    again = type(model).from_pretrained(folder / "again").state_dict()
    shutil.rmtree(folder / "again")
    first = model.state_dict()
    return first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def check_weights(dense: nn.Module, pruned: nn.Module, file: MaskFile, report: ss.PruneReport) -> None:
    """Zeros where the masks prune, half of each row; everything else as it was, bit for bit."""
    assert report.sparsity > 0
    before, after = dense.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    expected = {key: value.clone() for key, value in before.items()}
    places = {layer.name: layer for block in find_blocks(dense) for layer in block.layers}
    for layer in report.layers:
        if not layer.sparsity:  # left dense
            continue
        mask, place, turned = file.masks[layer.name], places[layer.name], file.layers[layer.name].transposed
        assert bool((mask.sum(1) == mask.shape[1] - mask.shape[1] // 2).all()), layer.name
        stored = mask.T if (place.transposed if turned is None else turned) else mask
        key = place.parameter_name
        if place.expert is None:
            expected[key] *= stored
        else:
            expected[key][place.expert] *= stored
    aliases: dict[int, Tensor] = {}
    for key, value in before.items():  # a tied weight has several names
        if not torch.equal(expected[key], value):
            aliases[value.data_ptr()] = expected[key]
    for key, value in after.items():
        wanted = aliases.get(before[key].data_ptr(), expected[key])
        assert torch.equal(value, wanted), key


def check_quality(
    dense: nn.Module, pruned: nn.Module, inputs: dict[str, Tensor], report: ss.PruneReport
) -> str:
    """The report's measure is what plain transformers say of both models."""
    if report.perplexity_dense is not None:
        found = [perplexity(model, inputs["input_ids"]) for model in (dense, pruned)]
        for mine, theirs in zip(found, (report.perplexity_dense, report.perplexity_pruned), strict=True):
            assert math.isclose(mine, theirs, rel_tol=1e-4), (found, report)
        return "perplexity"
    assert report.compared is not None
    assert report.cosine is not None
    states = [pooled(model, inputs, report.compared) for model in (dense, pruned)]
    cosine = float(nn.functional.cosine_similarity(*states, dim=-1).mean())
    assert math.isclose(cosine, report.cosine, abs_tol=1e-4), (cosine, report.cosine)
    return f"cosine of {report.compared}"


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """From the model's own logits, one window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        losses.append(float(nn.functional.cross_entropy(logits[:-1], window[1:])))
    return math.exp(sum(losses) / len(losses))


def pooled(model: nn.Module, inputs: dict[str, Tensor], names: str) -> Tensor:
    """(samples, parts, channels) of the named outputs: means over positions, embeddings as they are."""
    known = inspect.signature(model.base_model.forward).parameters
    with torch.no_grad():
        output = (model.base_model if all(name in known for name in inputs) else model)(**inputs)
        output = model(**inputs) if isinstance(output, tuple) else output
    parts = []
    for name in names.split(" and "):
        states = output[name].double()
        if states.ndim > 2:
            states = states.mean(1) if states.ndim == 3 else states.mean(tuple(range(2, states.ndim)))
        parts.append(states)
    return torch.stack(parts, 1)


def inputs_of(model: tf.PreTrainedModel) -> tuple[str, dict[str, Tensor]]:
    """What the model's own forward takes: tokens alone if it can, else features; ``SAMPLES`` of them.

    Raises:
        ValueError: if it takes none of what is tried.
    """
    reason = ""
    for kind, inputs in _candidates(model):
        first = {key: value[:1] for key, value in inputs.items()}
        try:
            with torch.no_grad():
                once, again = model(**first), model(**first)
        except Exception as error:  # as above
            reason = reason or _told(error)
            continue
        if any(not torch.equal(once[key], again[key]) for key in once if isinstance(once[key], Tensor)):
            reason = "its outputs are random"
            continue
        return kind, inputs
    raise ValueError(reason)


def _candidates(model: tf.PreTrainedModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
    takes = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(0)
    longest = max_length(model) or LENGTH
    ids = torch.randint(
        tiny_families.FIRST_WORD,
        tiny_families.VOCABULARY,
        (SAMPLES, min(LENGTH, longest)),
        generator=generator,
    )
    text = {"input_ids": ids}
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        text["decoder_input_ids"] = ids
    if "input_ids" in takes:
        yield "tokens", text
    features = [
        name for name in takes if re.fullmatch(r"pixel_values(_videos)?|input_features|input_values", name)
    ]
    for name in sorted(features, key=lambda each: each != model.main_input_name):
        for shape in _shapes(name, model.config):
            inputs = {name: torch.randn(SAMPLES, *shape, generator=generator)}
            yield name, inputs
            if "noise" in takes:  # what decides at random what is masked
                yield f"{name}, noise", {**inputs, "noise": torch.rand(SAMPLES, 64, generator=generator)}
            for more in ("input_ids", "decoder_input_ids"):
                if more in takes:
                    yield f"{name}, {more}", {**inputs, more: ids[:, :16].contiguous()}


def _shapes(name: str, config: tf.PretrainedConfig) -> Iterator[tuple[int, ...]]:
    """Shapes of one sample of an input, likeliest first."""
    if name.startswith("pixel_values"):
        channels = int(_number(config, "num_channels", "in_channels", "in_chans") or 3)
        size = _number(config, "image_size", "img_size", "pretrain_image_size", "resolution")
        side = size if isinstance(size, int) else tiny_families.IMAGE
        sizes = [(int(size[0]), int(size[-1]))] if isinstance(size, list | tuple) else []
        for height, width in [*sizes, (side, side), (64, 64), (224, 224)]:
            yield channels, height, width
            yield int(_number(config, "num_frames", "frames_per_clip") or 4), channels, height, width
        return
    channels = int(
        _number(
            config,
            "feature_projection_input_dim",
            "num_mel_bins",
            "feature_size",
            "n_mels",
            "input_feat_per_channel",
        )
        or 80
    )
    positions = int(_number(config, "max_source_positions") or 0)
    for length in (2 * positions, 64, 1024, 128):
        if length:
            yield channels, length
            yield length, channels
    for length in (4000, 16000):
        yield (length,)
        yield 1, length


def _number(config: Any, *names: str) -> Any:
    """The first of these fields in a configuration or in those inside of it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for each in [config, *inner]:
        for name in names:
            value = getattr(each, name, None)
            if isinstance(value, int | list | tuple) and value:
                return value
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def page(walked: Sequence[Walked]) -> str:
    """``docs/families.md``: what became of every family."""
    pruned = [each for each in walked if each.result == "pruned"]
    given = collections.Counter("tokens" if each.inputs == "tokens" else "other" for each in pruned)
    lines = [
        INTRODUCTION.format(
            version=tf.__version__,
            all=len(walked),
            built=len([each for each in walked if each.result != "not built"]),
            tried=len([each for each in walked if each.result not in ("not built", "not run")]),
            pruned=len(pruned),
            tokens=given["tokens"],
            others=given["other"],
        ),
        "## Pruned\n",
        "| family | model | given | layers | measure |",
        "|---|---|---|---|---|",
    ]
    for each in pruned:
        layers, measure = each.detail.split(" layers, ")
        lines.append(f"| {each.family} | `{each.model}` | {each.inputs} | {layers} | {measure} |")
    for title, result, heading in (
        ("Refused", "refused", "what it says"),
        ("Not tried: the model does not run on inputs made without its processor", "not run", "what it says"),
        ("Not built here", "not built", "why"),
        ("Wrong", "wrong", "what"),
    ):
        found = [each for each in walked if each.result == result]
        if found:
            lines += [f"\n## {title}\n", f"| family | model | {heading} |", "|---|---|---|"]
            lines += [f"| {each.family} | `{each.model}` | {_cell(each.detail)} |" for each in found]
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
# Families

Nothing in the package knows a family by name. What was tried, with transformers {version}: of {all} families
{built} have a configuration that lets itself be made small, and {tried} of these run on random inputs. A tiny
random model of each was pruned (Wanda, 50 %), saved, and read back by plain transformers. {pruned} came
through, {tokens} on tokens and {others} on other inputs: weights are zero where the masks prune and unchanged
elsewhere, and perplexity, or the cosine of the output to the dense model's, is what plain transformers
computes of both.
`python tests/walk_families.py` repeats it and writes this page; the tests walk some of the families.

## Models that take no tokens

Images and sound go in as tensors with a sample in each row, as the model's processor makes them: a
`.safetensors` file with the arguments of the model's forward by name, or a float `.npy` file of its main
input. `--calibration` and `--evaluation` take both.

```python
from safetensors.torch import save_file

pixels = processor(images, return_tensors="pt")["pixel_values"]  # (images, channels, height, width)
save_file({{"pixel_values": pixels}}, "images.safetensors")
```

Then `sparseswaps prune ./vit --calibration images.safetensors --evaluation others.safetensors --out pruned`.

The measure of such models, and of language models that are given such a file, is the mean cosine of an
output to the dense model's. The report names the output: `encoder_last_hidden_state` or `last_hidden_state`
where the model has one, averaged over positions, else embeddings of samples such as `image_embeds` and
`text_embeds`, and logits as the last resort.
"""


def _cell(text: str) -> str:
    needs = re.search(r"requires the (\S+) library", text)
    if needs:
        return f"needs the library {needs[1]}"
    if text.endswith("million parameters"):
        return f"the smallest that was found has {text.removeprefix('ValueError: ')}"
    short = textwrap.shorten(text, 160, placeholder=" ...")
    for sign, name in (("|", "&#124;"), ("<", "&lt;"), ("[", "&#91;"), ("*", "&#42;")):
        short = short.replace(sign, name)
    return short or "none of the inputs that were tried"


class _TooLongError(Exception):
    """A family took longer than it may."""


def _alarm(*_: object) -> None:
    raise _TooLongError(f"longer than {SECONDS} s")


def main(only: Sequence[str]) -> None:
    """Walk all families and write the page, or walk those named and print what became of each."""
    tf.utils.logging.set_verbosity(50)
    tf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _alarm)
    walked = []
    for family, name in tiny_families.families().items():
        if only and family not in only:
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(SECONDS)
            try:
                found = walk(family, name, Path(folder))
            except Exception as error:
                if only:
                    traceback.print_exc()
                found = Walked(family, name, "", "wrong", _told(error))
            finally:
                signal.alarm(0)
        walked.append(found)
        seconds = f"{time.perf_counter() - begin:.1f} s"
        sys.stdout.write(
            " | ".join((found.family, found.model, found.inputs, found.result, found.detail, seconds)) + "\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{dict(collections.Counter(each.result for each in walked))}\n")
    if not only:
        (Path(__file__).parents[1] / "docs" / "families.md").write_text(page(walked), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
