"""Models whose blocks stay in files: the masks of a model in memory, and one block at a time in memory."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration import gathering
from sparseswaps.calibration.activations import stream_through
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.evaluation import measures
from sparseswaps.evaluation.quality import model_embeddings, model_perplexity
from sparseswaps.masks.file import apply_masks, load_masks, verify_model
from sparseswaps.masks.saving import save_model
from sparseswaps.models import loading, offload
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.pruning import memory
from sparseswaps.pruning.report import PruneReport
from sparseswaps.pruning.run import prune
from sparseswaps.records.run import LayerRecord


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, tiny_models.tokens(2000).numpy())
    return path


def pruned(model: Path | LoadedModel, tokens: Path, out: Path | None, **options: object) -> PruneReport:
    arguments = {"calibration": tokens, "evaluation": tokens, "evaluation_limit": 8, **options}
    return prune(model, "0.5", samples=8, length=32, out=out, **arguments)


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, read by another library's reader than the product's."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def require_equal(one: Path, other: Path) -> None:
    a, b = load_masks(one), load_masks(other)
    assert a.layers == b.layers
    assert all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)
    x, y = saved(one), saved(other)
    assert x.keys() == y.keys()
    for name, tensor in x.items():
        assert tensor.dtype == y[name].dtype
        assert torch.equal(tensor, y[name])


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "mixtral", "bert", "t5"])
def test_an_offloaded_model_is_pruned_and_saved_as_one_in_memory(
    family: str, tokens: Path, tmp_path: Path
) -> None:
    # in memory transformers turns some layers of a T5 in float16 to float32, and they are saved so
    dense = tiny_models.save(family, tmp_path / "dense", torch.float32 if family == "t5" else torch.float16)
    here = pruned(dense, tokens, tmp_path / "memory")
    there = pruned(dense, tokens, tmp_path / "files", offload=True)
    require_equal(tmp_path / "memory", tmp_path / "files")
    assert there.perplexity_dense == here.perplexity_dense
    assert there.perplexity_pruned == here.perplexity_pruned
    assert there.cosine == here.cosine
    assert [x.error for x in there.layers] == [x.error for x in here.layers]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": ss.Mode.ONE_SHOT},
        {"objective": "drift=0.5,residual=0.5,metric", "activation_limit": 0.0},
        {"objective": "drift=auto", "solver": ss.Wanda()},
        {"update": ss.Reconstruction()},
        {"solver": ss.SparseGPT()},
        {"allocation": "knapsack"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_pruning_gives_the_same_offloaded(
    options: dict[str, object], tokens: Path, tmp_path: Path
) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense", torch.bfloat16)
    pruned(dense, tokens, tmp_path / "memory", **options)
    pruned(dense, tokens, tmp_path / "files", offload=True, **options)
    require_equal(tmp_path / "memory", tmp_path / "files")


class Watch:
    """Progress of a run that looks at where the weights of the blocks are."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = find_blocks(model)
        self.most = 0

    def look(self) -> None:
        here = [x for x in self._blocks if any(not p.is_meta for p in x.module.parameters())]
        self.most = max(self.most, len(here))

    def stage(self, text: str, done: int, total: int) -> None:
        self.look()

    def layer_started(self, name: str) -> None:
        self.look()

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        self.look()


def test_one_block_at_a_time_is_in_memory(tokens: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_models.save("llama", tmp_path / "dense"), offload=True)
    assert loaded.residence.offloaded
    watch = Watch(loaded.model)
    for block in find_blocks(loaded.model):  # and none of them outside of a call
        block.module.register_forward_hook(lambda *_: watch.look())
    pruned(loaded, tokens, tmp_path / "out", progress=watch, objective="drift=0.5,residual=0.5,metric")
    assert watch.most == 1
    assert all(p.is_meta for block in find_blocks(loaded.model) for p in block.module.parameters())
    assert verify_model(load_model(tmp_path / "out", dtype="checkpoint"), load_masks(tmp_path / "out")).ok


def test_an_interrupted_run_goes_on_offloaded_or_not(tokens: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    class Interrupt(Watch):
        def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
            if record.block == 1:
                raise StopError

    dense = tiny_models.save("llama", tmp_path / "dense")
    pruned(dense, tokens, tmp_path / "whole")
    for first in (True, False):
        out = tmp_path / f"cut-{first}"
        with pytest.raises(StopError):
            pruned(dense, tokens, out, offload=first, progress=Interrupt(load_model(dense).model))
        pruned(dense, tokens, out, offload=not first, resume=True)
        require_equal(tmp_path / "whole", out)


def test_masks_are_applied_measured_and_verified_offloaded(tokens: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense", torch.float16)
    report = pruned(dense, tokens, tmp_path / "pruned")
    file = load_masks(tmp_path / "pruned")
    loaded = load_model(dense, dtype="checkpoint", offload=True)
    facts = apply_masks(loaded, file)
    save_model(tmp_path / "again", loaded, file.masks, facts)
    require_equal(tmp_path / "pruned", tmp_path / "again")
    again = load_model(tmp_path / "again", dtype="checkpoint", offload=True)
    assert verify_model(again, file, load_model(dense, dtype="checkpoint", offload=True)).ok
    assert not verify_model(load_model(dense, dtype="checkpoint", offload=True), file).ok
    windows = tiny_models.tokens(8 * 32).view(8, 32)
    wide = load_model(tmp_path / "pruned", offload=True)
    assert model_perplexity(wide, windows) == model_perplexity(load_model(tmp_path / "pruned"), windows)
    assert report.perplexity_pruned is not None
    bert = tiny_models.save("bert", tmp_path / "bert")
    found = model_embeddings(load_model(bert, offload=True), windows)
    assert torch.equal(found, model_embeddings(load_model(bert), windows))
    with pytest.raises(ss.InvalidFileError, match="expected the weights that the masks were made for"):
        apply_masks(load_model(tiny_models.save("llama", tmp_path / "b", seed=1), offload=True), file)


def test_what_cannot_be_offloaded_is_refused(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    with pytest.raises(ss.InputError, match=r"refinement .* expected a model in memory, found offloading"):
        pruned(dense, tokens, tmp_path / "out", offload=True, refine=1)
    with monkeypatch.context() as patch:
        patch.setattr(offload, "stacks_of", lambda model: [("", [model])])
        with pytest.raises(ss.InvalidModelError, match="expected a model with a stack of blocks, found none"):
            load_model(dense, offload=True)
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ss.InvalidModelError, match="expected a transformers checkpoint"):
        load_model(dense, offload=True)
    assert not (tmp_path / "out").exists()


def deep(folder: Path, blocks: int = 6) -> Path:
    """A checkpoint of more blocks than the two that offloading holds: one, and one that is read ahead."""
    config = tiny_models.build("llama").config
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Reads(dict[str, Tensor]):
    """Files that count how often each parameter is read, and by which thread."""

    def __init__(self, files: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._files = files
        self.counts: Counter[str] = Counter()
        self.threads: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.counts[name] += 1
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return self._files[name]

    def per_block(self, blocks: int = 6) -> list[int]:
        """How often each block was read, by a parameter that nobody reads for itself."""
        return [self.counts[f"model.layers.{i}.input_layernorm.weight"] for i in range(blocks)]


def counted(folder: Path) -> tuple[LoadedModel, Reads]:
    loaded = load_model(folder, offload=True)
    assert isinstance(loaded.residence, offload.OffloadedBlocks)
    reads = Reads(loaded.residence._files)
    loaded.residence._files = loaded.residence._reader._files = reads
    return loaded, reads


def test_each_block_is_read_once_in_a_pass_and_ahead(tmp_path: Path) -> None:
    loaded, reads = counted(deep(tmp_path / "dense"))
    blocks, windows = find_blocks(loaded.model), tiny_models.tokens(8 * 32).view(8, 32)
    with torch.no_grad():
        loaded.model(input_ids=windows)
    assert reads.per_block() == [1] * 6
    assert reads.threads == {"MainThread", "weights"}
    reads.counts.clear()
    reads.threads.clear()
    stream_through(loaded.model, blocks, windows, 2, loaded.residence)
    assert reads.per_block() == [1] * 6
    reads.counts.clear()
    gradient_moments(loaded.model, blocks, windows, 2, residence=loaded.residence)
    # how logits are made, forward and backward; the last one is in memory when the way back begins
    assert reads.per_block() == [3] * 5 + [2]
    reads.counts.clear()
    gradient_moments(loaded.model, blocks, windows, 2, wanted=blocks[4:], residence=loaded.residence)
    found = reads.per_block()
    # the first one is in memory from before; the one behind the last backward may be read ahead for nothing
    assert found[:3] + found[4:] == [1, 2, 2, 3, 2]
    assert found[3] in (2, 3)


def test_no_run_reads_blocks_again_for_more_windows(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "TOKENS_PER_BATCH", 64)  # two windows, one where gradients are gathered
    monkeypatch.setattr(measures, "TOKENS_PER_BATCH", 64)
    found: list[list[str]] = []
    original = offload._Reader.read

    def noted(self: offload._Reader, block: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        found[-1].append(block)
        return original(self, block, dtypes)

    monkeypatch.setattr(offload._Reader, "read", noted)
    for windows in (8, 16):
        found.append([])
        prune(
            load_model(deep(tmp_path / str(windows)), offload=True),
            "0.5",
            calibration=tokens,
            evaluation=tokens,
            evaluation_limit=windows,
            samples=windows,
            length=32,
            objective="drift=0.5,residual=0.5,metric",
        )
    assert found[0] == found[1]
    assert len(found[0]) < 24 * 6


def test_a_block_is_as_it_is_now_when_it_comes_again(tmp_path: Path) -> None:
    """What is in memory still is not taken where it was written into, or where its layers have changed."""
    loaded, reads = counted(deep(tmp_path / "dense"))
    block = find_blocks(loaded.model)[2]
    layer = block.layers[0]
    residence = loaded.residence

    def seen() -> Tensor:
        with residence.resident(block):
            return layer.weight.clone()

    dense = seen()
    assert torch.equal(seen(), dense)
    assert reads.counts[layer.parameter_name] == 1
    with residence.resident(block):
        layer.write(torch.zeros_like(dense))
    assert torch.equal(seen(), dense)  # nothing is written back
    residence.change(layer, lambda weight: weight * 2)
    assert torch.equal(seen(), 2 * dense)
    with residence.resident(block):
        residence.change(layer, lambda weight: weight * 3)
        assert torch.equal(layer.weight, 3 * dense)
    assert torch.equal(seen(), 3 * dense)
    residence.restore([layer], {})
    assert torch.equal(seen(), dense)
    assert all(parameter.is_meta for parameter in block.module.parameters())


def test_errors_of_reading_ahead_are_said_where_the_block_is_needed(tmp_path: Path) -> None:
    loaded, reads = counted(deep(tmp_path / "dense"))
    blocks = find_blocks(loaded.model)
    name = blocks[1].layers[0].parameter_name
    original = reads._files
    reads._files = {key: value for key, value in original.items() if key != name}
    with loaded.residence.resident(blocks[0]):
        pass
    with pytest.raises(KeyError, match=re.escape(name)), loaded.residence.resident(blocks[1]):
        pass
    reads._files = original  # it is read again when it is asked for again
    with loaded.residence.resident(blocks[1]):
        assert not blocks[1].layers[0].weight.is_meta
    assert all(parameter.is_meta for block in blocks for parameter in block.module.parameters())


def test_an_interrupt_while_a_block_is_read_leaves_none_in_the_model(tmp_path: Path) -> None:
    loaded, _ = counted(deep(tmp_path / "dense"))
    blocks = find_blocks(loaded.model)
    with pytest.raises(KeyboardInterrupt), loaded.residence.resident(blocks[0]):
        raise KeyboardInterrupt
    assert all(parameter.is_meta for block in blocks for parameter in block.module.parameters())
    with loaded.residence.resident(blocks[0]):
        assert not blocks[0].layers[0].weight.is_meta


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = deep(tmp_path / "dense")
    whole, offloaded = [], []
    pruned(dense, tokens, None, announce=whole.append)
    pruned(dense, tokens, None, announce=offloaded.append, offload=True)
    assert offloaded[0].model_bytes < whole[0].model_bytes
    sizes = [x.model_bytes + x.host_bytes for x in (offloaded[0], whole[0])]
    assert sizes[0] < sizes[1]

    loads: list[dict[str, object]] = []
    real = loading.load_model

    def counted(*args: object, **kwargs: object) -> LoadedModel:
        loads.append(kwargs)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["sparseswaps.pruning.inputs"], "load_model", counted)
    monkeypatch.setattr(memory, "available_memory", lambda: sum(sizes) // 2)
    with pytest.raises(ss.InputError, match=r"for the model, .* and so does offloading"):
        pruned(dense, tokens, tmp_path / "out")
    assert [load["weights"] for load in loads] == [False]
    assert not (tmp_path / "out").exists()
    pruned(dense, tokens, tmp_path / "out", offload=True)
