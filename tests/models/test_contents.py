"""A model or a text is another one if anything in it that counts is; large files are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from sparseswaps.calibration.texts import text_hash
from sparseswaps.errors import InputError
from sparseswaps.models import contents
from sparseswaps.models.contents import cache_file, file_hash, model_hash
from sparseswaps.pruning.run import prune


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which every file is remembered at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "REMEMBERED", 0)
    monkeypatch.setattr(contents, "SETTLED", -1e9)
    return cache_file()


def scaled(folder: Path, name: str) -> None:
    """Change one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.5 + 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def appended(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write("\n")

    return change


def test_every_part_of_a_model_counts_and_nothing_else(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_own.py").write_text("x = 1\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = model_hash(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_hash(tmp_path / "elsewhere") == before
    (folder / "README.md").write_text("a card")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    assert model_hash(folder) == before
    seen = {before}
    changes = [appended(name) for name in ("config.json", "tokenizer.json", "modeling_own.py")]
    changes += [appended("chat_template.jinja")]
    names = load_file(folder / "model.safetensors")
    changes += [lambda path, name=name: scaled(path, name) for name in names]
    for change in changes:
        change(folder)
        seen.add(model_hash(folder))
    assert len(seen) == 1 + len(changes)


def test_texts_are_what_is_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.jsonl").write_text('{"text": "two"}')
    seen = [text_hash(folder), text_hash(folder / "a.txt"), text_hash(f"{folder / 'b.jsonl'}:text")]
    assert seen[1] == hashlib.sha256(b"one").hexdigest()
    assert seen[2] == text_hash(folder / "b.jsonl")
    (folder / "ignored.png").write_bytes(b"x")
    assert text_hash(folder) == seen[0]
    (folder / "a.txt").write_text("eno")
    seen.append(text_hash(folder))
    (folder / "a.txt").rename(folder / "c.txt")  # another order of the documents
    seen.append(text_hash(folder))
    assert len(set(seen)) == len(seen)
    assert text_hash("stdlib") != text_hash("stdlib-held-out")
    assert text_hash("c4") is None


def test_a_large_file_is_read_once_and_again_when_it_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "file", []
    path.write_bytes(b"first")
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: reads.append(1) or digest(file, kind))
    for _ in range(3):
        assert file_hash(path) == hashlib.sha256(b"first").hexdigest()
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"other")  # of the same size, with the times of the first
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_hash(path) == hashlib.sha256(b"other").hexdigest()
    replacement = tmp_path / "replacement"
    replacement.write_bytes(b"third")
    os.utime(replacement, ns=(times.st_atime_ns, times.st_mtime_ns))
    replacement.replace(path)
    assert file_hash(path) == hashlib.sha256(b"third").hexdigest()
    assert len(reads) == 3
    # a file that has just changed may change again within one tick of the clock
    monkeypatch.setattr(contents, "SETTLED", 3600.0)
    path.write_bytes(b"fresh")
    file_hash(path)
    file_hash(path)
    assert len(reads) == 5


@pytest.mark.parametrize("damage", ["text", "list", "entry", "folder", "file"])
def test_a_cache_that_cannot_be_used_is_done_without(damage: str, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"what is there")
    cache.parent.parent.mkdir()
    if damage == "file":  # instead of the folder of the cache
        cache.parent.write_text("")
    else:
        cache.parent.mkdir()
    if damage == "folder":
        cache.mkdir()
    elif damage != "file":
        cache.write_text({"text": "{", "list": "[1]", "entry": json.dumps({str(path): [1, "x"]})}[damage])
    assert file_hash(path) == file_hash(path) == hashlib.sha256(b"what is there").hexdigest()
    assert not list(cache.parent.glob("contents-*"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_run_is_not_resumed_with_other_weights_outside_the_layers(name: str, tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "model")
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(200).numpy())
    options = {
        "calibration": tmp_path / "tokens.npy", "samples": 4, "length": 16, "out": tmp_path / "out"
    }  # fmt: skip

    seen: list[int] = []

    def stop(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(folder, on_layer=stop, **options)
    scaled(folder, name)
    with pytest.raises(InputError, match="found another checkpoint"):
        prune(folder, resume=True, **options)
