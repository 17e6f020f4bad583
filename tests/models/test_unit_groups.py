"""Channels and heads of real families: found, refused with a reason, and taken out of the model for good.

Plain transformers judges: the larger model with the columns of missing units at zero and the smaller one,
in memory and read back with the class that its configuration names, return the same.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_models
import torch
import transformers as tf
from torch import Tensor, nn

from sparseswaps.calibration.unit_groups import FoundUnits, find_units
from sparseswaps.errors import InputError, InvalidModelError, VerificationError
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.models.shrinking import check_shrinkable, shrunk_model, verify_shrunk
from sparseswaps.models.units import UnitGroup

# Sums of at most 128 terms in another order, through two blocks, in float32: some 1e-6 of the largest output.
ROUNDING = 2e-5

# Of each family: channels, entries of parameters per channel; query heads, those that share keys and values,
# entries per query head and per group with keys and values (hidden size 32, heads of 8), None where no
# configuration of the family holds fewer heads.
FAMILIES: dict[str, tuple[int, int, int, int, int | None, int | None]] = {
    "llama": (48, 3 * 32, 4, 2, 512, 1536),
    "qwen2": (48, 3 * 32, 4, 2, 512 + 8, 1536 + 32),  # biases of q, k, v
    "qwen3": (48, 3 * 32, 4, 2, 512, 1536),
    "gemma2": (48, 3 * 32, 4, 2, 512, 1536),
    "gemma3_text": (48, 3 * 32, 4, 2, 512, 1536),
    "phi3": (48, 3 * 32, 4, 2, 512, 1536),
    "gpt2": (128, 2 * 32 + 1, 4, 1, None, None),
    "opt": (48, 2 * 32 + 1, 4, 1, None, None),
    "gpt_neox": (48, 2 * 32 + 1, 4, 1, None, None),
    "bert": (48, 2 * 32 + 1, 4, 1, None, None),
}


def build(family: str, vectors: bool = True) -> Any:
    """A tiny model; with ``vectors`` its biases and norms differ from entry to entry, as trained ones do."""
    model: Any = tiny_families.build(family, tiny_families.families()[family])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if vectors and parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(count: int = 2, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    first, last = tiny_families.FIRST_WORD, tiny_families.VOCABULARY
    return torch.randint(first, last, (count, length), generator=generator)


def as_loaded(model: Any) -> LoadedModel:
    named = [*model.named_parameters(), *model.named_buffers()]
    return LoadedModel(model, None, "tiny", {name: tensor.dtype for name, tensor in named})


def units_of(model: Any, *kinds: Any) -> FoundUnits:
    before = copy.deepcopy(model.state_dict())
    found = find_units(model, find_blocks(model), tokens(), kinds)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def output(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens())[0]
    return result


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING * float(one.abs().max()))


def random_kept(groups: Sequence[UnitGroup], count: int) -> list[Tensor]:
    """``count`` random units of each group, equally many of those that share keys and values."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for group in groups:
        sets = group.units // group.exchangeable
        scores = torch.rand(sets, group.exchangeable, generator=generator)
        found.append((scores.argsort(1).argsort(1) < count // sets).flatten())
    return found


def without(groups: Sequence[UnitGroup], kept: Sequence[Tensor]) -> None:
    """Zero the columns of missing units."""
    for group, mask in zip(groups, kept, strict=True):
        group.consumer.weight[:, group.columns[~mask].flatten()] = 0


def check(model: Any, groups: Sequence[UnitGroup], count: int, entries: int, folder: Path) -> None:
    loaded, size = as_loaded(model), model.num_parameters()
    announced = check_shrinkable(loaded, groups, [count] * len(groups))
    assert announced == size - entries * sum(group.units - count for group in groups)
    kept, dense = random_kept(groups, count), output(model)
    without(groups, kept)
    expected = output(model)
    assert float((expected - dense).abs().max()) > 100 * ROUNDING * float(dense.abs().max())
    small = shrunk_model(loaded, groups, kept)
    assert_same(expected, output(small.model))
    verify_shrunk(model, small.model, tokens())
    small.model.save_pretrained(folder)
    reloaded = getattr(tf, type(model).__name__).from_pretrained(folder).eval()
    assert reloaded.num_parameters() == small.model.num_parameters() == announced
    assert_same(expected, output(reloaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Where no configuration of the family holds fewer heads, that is said before any work."""
    channels, entries, heads, sharing, head_entries, group_entries = FAMILIES[family]
    model = build(family)
    found = units_of(model, "channels", "heads", "kv-groups")
    assert not found.missing
    dense = copy.deepcopy(model.state_dict())
    for kind, units, count, each in (
        ("channels", channels, channels - 16, entries),
        ("heads", heads, heads // 2, head_entries),
        ("kv-groups", heads // sharing, heads // sharing // 2, group_entries),
    ):
        groups = [group for group in found.groups if group.kind == kind]
        assert [group.block for group in groups] == [0, 1]
        assert [group.units for group in groups] == [units, units]
        if kind != "channels":
            assert all(group.sharing == sharing and group.head_dim == 8 for group in groups)
        model.load_state_dict(dense)
        if each is not None:
            check(model, groups, count, each, tmp_path / kind)
            continue
        with pytest.raises(
            InvalidModelError, match="a configuration that holds 2 instead of 4, found none: with"
        ):
            check_shrinkable(as_loaded(model), groups, [2, 2])


def test_channels_and_heads_at_once(tmp_path: Path) -> None:
    model = build("phi3")
    found = units_of(model, "channels", "kv-groups").groups
    counts = [1 if group.kind == "kv-groups" else 20 for group in found]
    loaded = as_loaded(model)
    announced = check_shrinkable(loaded, found, counts)
    kept = [random_kept([group], count)[0] for group, count in zip(found, counts, strict=True)]
    without(found, kept)
    small = shrunk_model(loaded, found, kept).model
    assert small.num_parameters() == announced == model.num_parameters() - 2 * (28 * 96 + 1536)
    assert_same(output(model), output(small))


def test_rows_of_fused_layers() -> None:
    """Queries, keys and values one after another, or group by group; gate and value in halves."""
    head = torch.arange(8)
    grouped = units_of(build("phi3"), "kv-groups", "heads", "channels").groups
    together, alone, channels = (
        next(x for x in grouped if x.kind == k) for k in ("kv-groups", "heads", "channels")
    )
    assert together.producers[0][1].tolist()[1] == [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert alone.producers[0][1].tolist() == [(8 * h + head).tolist() for h in range(4)]
    assert channels.producers[0][1].tolist()[5] == [5, 53]
    neox = units_of(build("gpt_neox"), "heads").groups[0]
    assert neox.producers[0][1].tolist()[2] == list(range(48, 72))
    config = tiny_families.small_config("falcon")
    config.new_decoder_architecture, config.num_kv_heads = True, 2
    torch.manual_seed(0)
    falcon = units_of(tf.FalconForCausalLM(config).eval(), "kv-groups", "heads").groups
    assert falcon[0].producers[0][1].tolist()[1] == list(range(32, 64))
    assert falcon[1].producers[0][1].tolist()[2] == list(range(32, 40))


class Interleaved(nn.Module):
    """A block whose gates and values are neighbouring rows; with ``norm`` it norms all channels together."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.packed = nn.Linear(16, 48)
        self.down = nn.Linear(24, 16)
        self.norm = nn.RMSNorm(24) if norm else nn.Identity()

    def forward(self, states: Tensor) -> Tensor:
        gate, value = self.packed(states)[..., ::2], self.packed(states)[..., 1::2]
        result: Tensor = states + self.down(self.norm(torch.relu(gate) * value))
        return result


class Plain(nn.Module):
    """A model without a configuration."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Interleaved(norm) for _ in range(2))

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return (states,)


def test_neighbouring_gates() -> None:
    torch.manual_seed(0)
    found = units_of(Plain().eval(), "channels")
    assert [group.producers[0][1].tolist()[3] for group in found.groups] == [[6, 7], [6, 7]]


def test_norms_over_units_are_refused() -> None:
    """Also where all their weights are one, so that an exchange changes nothing."""
    torch.manual_seed(0)
    found = units_of(Plain(norm=True).eval(), "channels")
    assert not found.groups
    assert "such as a norm of all" in found.missing[1, "channels"]
    for vectors, reason in ((False, "such as a norm of all"), (True, "changes when they change places")):
        found = units_of(build("olmo2", vectors), "channels", "heads", "kv-groups")
        assert [group.kind for group in found.groups] == ["channels", "channels"]
        assert all(reason in found.missing[b, k] for b in (0, 1) for k in ("heads", "kv-groups"))  # type: ignore[index]


@pytest.mark.parametrize("family", ["gpt_oss", "bloom"])
def test_what_belongs_to_a_head_alone_is_refused(family: str) -> None:
    """Attention sinks, slopes of positions; and fused experts, which nobody looks into."""
    found = units_of(build(family), "channels", "heads", "kv-groups")
    assert "changes when they change places" in found.missing[0, "heads"]
    assert "changes when they change places" in found.missing[1, "kv-groups"]
    if family == "gpt_oss":
        assert not found.groups
        assert "fused experts are not looked into" in found.missing[1, "channels"]


def test_one_group_of_keys_and_values() -> None:
    found = units_of(build("falcon"), "heads", "kv-groups")
    assert [(group.kind, group.sharing) for group in found.groups] == [("heads", 4)] * 2
    assert found.missing[0, "kv-groups"].endswith("all heads share one group of keys and values")


def test_keys_and_values_that_later_blocks_read() -> None:
    """Blocks 2 and 3 read keys and values of 0 and 1, which therefore are of nobody's alone."""
    found = units_of(build("gemma4_text"), "kv-groups")
    assert not found.groups
    assert "changes when they change places" in found.missing[0, "kv-groups"]


def test_a_broken_model_shows_nothing() -> None:
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    found = find_units(model, find_blocks(model), tokens(), ["channels"])
    assert not found.groups
    assert all("nothing shows whether they belong together" in found.missing[b, "channels"] for b in (0, 1))


def test_numbers_that_cannot_be_kept() -> None:
    loaded = as_loaded(build("llama"))
    channels = units_of(loaded.model, "channels").groups
    heads = units_of(loaded.model, "heads").groups
    groups = units_of(loaded.model, "kv-groups").groups
    with pytest.raises(
        InputError, match=r"channels: expected equally many kept in every block.* 32 in block 0"
    ):
        check_shrinkable(loaded, channels, [32, 31])
    with pytest.raises(InputError, match="from 2 to 4, a multiple of 2, found 3"):
        check_shrinkable(loaded, heads, [3, 3])
    with pytest.raises(InputError, match="expected one kind of them, found several"):
        check_shrinkable(loaded, [*heads, *groups], [2, 2, 1, 1])
    with pytest.raises(InputError, match=r"block 1: expected equally many kept of every 2.* found \[2, 0\]"):
        shrunk_model(loaded, heads, [torch.tensor([1, 0, 0, 1]).bool(), torch.tensor([1, 1, 0, 0]).bool()])
    with pytest.raises(InvalidModelError, match=r"layers\.1\.mlp.* is .32, 32. instead of .48, 32."):
        check_shrinkable(loaded, channels[:1], [32])


def test_a_configuration_that_transformers_refuses() -> None:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=6
    )
    torch.manual_seed(0)
    loaded = as_loaded(tf.LlamaForCausalLM(config).eval())
    heads = units_of(loaded.model, "heads").groups
    assert check_shrinkable(loaded, heads, [4]) == loaded.model.num_parameters() - 2 * 4 * 8 * 48
    with pytest.raises(InvalidModelError, match=r"transformers says: .*48.* is not a multiple of .*5"):
        check_shrinkable(loaded, heads, [5])


def test_a_smaller_model_that_computes_something_else() -> None:
    loaded = as_loaded(build("llama"))
    groups = units_of(loaded.model, "channels").groups
    small = shrunk_model(loaded, groups, random_kept(groups, 24))
    with pytest.raises(VerificationError, match="found a difference of"):
        verify_shrunk(loaded.model, small.model, tokens())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_offloaded(family: str, tmp_path: Path) -> None:
    """The same units; the smaller model is in memory, a tied head still tied."""
    tiny_models.save(family, tmp_path / "dense")
    loaded, here = (load_model(tmp_path / "dense", offload=offload) for offload in (True, False))
    window = tiny_models.tokens(32).view(2, 16)
    results = []
    for each in (loaded, here):
        blocks = find_blocks(each.model)
        groups = find_units(each.model, blocks, window, ["channels", "kv-groups"], each.residence).groups
        kept = [random_kept([x], 12 if x.kind == "channels" else 1)[0] for x in groups]
        small = shrunk_model(each, groups, kept)
        assert not any(parameter.is_meta for parameter in small.model.parameters())
        head, embedding = small.model.get_output_embeddings(), small.model.get_input_embeddings()
        assert (head.weight is embedding.weight) == (family == "llama-tied")
        small.model.save_pretrained(tmp_path / "small")
        results.append(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """30 blocks of 1536 channels and 3 groups of 3 heads; a third of both goes."""
    loaded = load_model(smollm2)
    window = torch.arange(1000, 1032).view(2, 16)
    found = find_units(loaded.model, find_blocks(loaded.model), window, ["channels", "kv-groups"])
    assert [group.units for group in found.groups] == [3, 1536] * 30
    counts = [2 if group.units == 3 else 1024 for group in found.groups]
    announced = check_shrinkable(loaded, found.groups, counts)
    entries = 512 * 3 * 576 + (3 + 1 + 1 + 3) * 64 * 576  # columns and rows of channels; q, k, v, o
    assert announced == loaded.model.num_parameters() - 30 * entries
    kept = [random_kept([group], count)[0] for group, count in zip(found.groups, counts, strict=True)]
    small = shrunk_model(loaded, found.groups, kept)
    without(found.groups, kept)
    verify_shrunk(loaded.model, small.model, window)
    small.restore_dtypes()
    small.model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2 * announced + 100_000
