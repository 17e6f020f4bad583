"""Texts in the formats that people have: the same documents give the same tokens, the rest one sentence."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.calibration.records import RECORD_KINDS
from sparseswaps.calibration.texts import FILE_KINDS, read_documents
from sparseswaps.calibration.windows import calibration_windows, evaluation_windows
from sparseswaps.study.problems import DEMO_MODEL

# blank lines, characters that end a line elsewhere than in JSON, quotes, an empty document
DOCUMENTS = [
    "def one():\n    return 1\n",
    "Größe, \u201cquoted\u201d, \u2028 and \x85 in a line",
    "",
    'a "quote", a back\\slash\n\nand a blank line',
    *(f"for i in range({n}):\n    print(i)" for n in range(30)),
]
BOM = b"\xef\xbb\xbf"
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<end>\n{% endfor %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
)
TALKS = [[("user", f"how is {n}?"), ("assistant", f"{n} is well.\nThanks")] for n in range(12)]
RENDERED = ["".join(f"<|{role}|>\n{content}<end>\n" for role, content in talk) for talk in TALKS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level, so that white space counts."""
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def chatting() -> Any:
    found = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    found.chat_template = CHATML
    return found


def lines(documents: list[Any], column: str = "text") -> bytes:
    records = [{"id": n, column: each, "url": None} for n, each in enumerate(documents)]
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records)


def parquet(path: Path, documents: list[Any], column: str = "text", type: Any = None) -> None:
    array = pyarrow.array(documents, type)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), column: array}), path)


def folder(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


def listed(documents: list[str]) -> bytes:
    return json.dumps([{"text": each} for each in documents], indent=1).encode()


# by name of the source: makes it
FORMATS: dict[str, Callable[[Path], object]] = {
    "bom.txt": lambda p: p.write_bytes(BOM + "\n\n".join(DOCUMENTS).encode()),
    "packed.txt.gz": lambda p: p.write_bytes(gzip.compress("\n\n".join(DOCUMENTS).encode())),
    "no-suffix": lambda p: p.write_bytes("\n\n".join(DOCUMENTS).encode()),
    "a.jsonl": lambda p: p.write_bytes(lines(DOCUMENTS)),
    "A.JSONL": lambda p: p.write_bytes(lines(DOCUMENTS)),
    "bom.jsonl": lambda p: p.write_bytes(BOM + lines(DOCUMENTS)),
    "windows.jsonl": lambda p: p.write_bytes(lines(DOCUMENTS).replace(b"\n", b"\r\n")),
    "blank.jsonl": lambda p: p.write_bytes(lines(DOCUMENTS).replace(b"\n", b"\n\n")),
    "unterminated.jsonl": lambda p: p.write_bytes(lines(DOCUMENTS).rstrip()),
    "a.ndjson": lambda p: p.write_bytes(lines(DOCUMENTS)),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(DOCUMENTS))),
    "lines.json": lambda p: p.write_bytes(lines(DOCUMENTS)),
    "lines.json.gz": lambda p: p.write_bytes(gzip.compress(lines(DOCUMENTS))),
    "list.json": lambda p: p.write_bytes(listed(DOCUMENTS)),
    "body.jsonl:body": lambda p: p.write_bytes(lines(DOCUMENTS, "body")),
    "with:colon.jsonl": lambda p: p.write_bytes(lines(DOCUMENTS)),
    "with:colon.jsonl:body": lambda p: p.write_bytes(lines(DOCUMENTS, "body")),
    "a.parquet": lambda p: parquet(p, DOCUMENTS),
    "body.parquet:body": lambda p: parquet(p, DOCUMENTS, "body"),
    "large.parquet": lambda p: parquet(p, DOCUMENTS, type=pyarrow.large_string()),
    "dictionary.parquet": lambda p: parquet(
        p, DOCUMENTS, type=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    ),
    "texts": lambda p: folder(
        p, {f"{n:03}.txt": BOM * (n % 2) + each.encode() for n, each in enumerate(DOCUMENTS)}
    ),
    "mixed": lambda p: folder(
        p,
        {
            "0.txt": DOCUMENTS[0].encode(),
            "1.jsonl": lines(DOCUMENTS[1:5]),
            "2.json.gz": gzip.compress(listed(DOCUMENTS[5:9])),
            "3.jsonl": BOM + lines(DOCUMENTS[9:]),
            ".hidden": b"\0",
        },
    ),
    "shards:body": lambda p: folder(
        p, {"b.jsonl": lines(DOCUMENTS[10:], "body"), "a.jsonl": lines(DOCUMENTS[:10], "body")}
    ),
}


def made(name: str, home: Path) -> str:
    """A source of that name in ``home``."""
    stem = name.removesuffix(":body")
    FORMATS[name](home / stem)
    return str(home / name)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_give_the_same_tokens(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """The tokens of the joined text, by the tokenizer alone, and the windows of the plain file."""
    (tmp_path / "plain.txt").write_bytes("\n\n".join(DOCUMENTS).encode())
    source = made(name, tmp_path)
    ids = tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    found = evaluation_windows(source, tokenizer, 16)
    assert found.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert found.source == source
    chosen = calibration_windows(source, tokenizer, 9, 16, seed=4)
    assert chosen.hash == calibration_windows(tmp_path / "plain.txt", tokenizer, 9, 16, seed=4).hash


def test_what_else_lies_in_a_folder_is_named(tmp_path: Path, tokenizer: Any) -> None:
    folder(tmp_path / "texts", {"a.txt": b"def f(): pass\n" * 9, "README.md": b"#", "t.npy": b""})
    (tmp_path / "texts" / "more").mkdir()
    with pytest.warns(UserWarning, match=r"what is no text is left out: README.md, more, t.npy$"):
        evaluation_windows(tmp_path / "texts", tokenizer, 8)


def test_a_saved_dataset_is_read_as_a_dataset(tmp_path: Path, tokenizer: Any, chatting: Any) -> None:
    """By split and column, with conversations rendered; calibration draws documents, evaluation joins."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    talks = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
    rows = datasets.Dataset.from_dict({"messages": talks, "body": [f"body {n}" for n in range(12)]})
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "set")
    for source, documents in (("set:test", RENDERED), ("set:test:body", [f"body {n}" for n in range(12)])):
        ids = chatting("\n\n".join(documents), add_special_tokens=False)["input_ids"]
        found = evaluation_windows(tmp_path / source, chatting, 8)
        assert found.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]
    pieces = [chatting(each, add_special_tokens=False)["input_ids"] for each in RENDERED]
    for window in calibration_windows(tmp_path / "set:test", chatting, 5, 8).tokens.tolist():
        assert any(window == each[i : i + 8] for each in pieces for i in range(len(each) - 7))
    datasets.Dataset.from_dict({"text": ["a text", None], "n": [1, 2]}).save_to_disk(tmp_path / "holes")
    for source, message in [
        ("holes", "row 2: expected a text or a list of messages, found null"),
        ("holes:train:n", "row 1: expected a text or a list of messages, found int"),
        ("holes:train:body", "expected a column body, found text, n"),
    ]:
        with pytest.raises(ss.InvalidTextError, match=message):
            evaluation_windows(tmp_path / source, tokenizer, 2)


def share_gpt(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[role], "value": content} for role, content in talk]


def spoken(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.mark.parametrize("column", ["messages", "conversations", "dialogue"])
@pytest.mark.parametrize("form", [spoken, share_gpt])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_rendered(column: str, form: Any, kind: str, tmp_path: Path, chatting: Any) -> None:
    talks = [form(talk) for talk in TALKS]
    if kind == "jsonl":
        (tmp_path / "c.jsonl").write_bytes(lines(talks, column))
    else:
        parquet(tmp_path / "c.parquet", talks, column)
    source = tmp_path / (f"c.{kind}:{column}" if column == "dialogue" else f"c.{kind}")
    assert list(read_documents(source, chatting)) == RENDERED
    ids = chatting("\n\n".join(RENDERED), add_special_tokens=False)["input_ids"]
    found = evaluation_windows(source, chatting, 8)
    assert found.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]


def test_a_text_goes_before_a_conversation(tmp_path: Path, chatting: Any) -> None:
    record = {"messages": spoken(TALKS[0]), "text": "the text"}
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    assert list(read_documents(tmp_path / "c.jsonl", chatting)) == ["the text"]
    assert list(read_documents(f"{tmp_path / 'c.jsonl'}:messages", chatting)) == [RENDERED[0]]


def told(source: object, tokenizer: Any) -> str:
    """The sentence with which a source is refused."""
    with pytest.raises(ss.InvalidTextError) as caught:
        evaluation_windows(source, tokenizer, 8)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "expected" in sentence
    assert "found" in sentence
    return sentence


MESSAGE = {"role": "user", "content": "hello"}
REFUSED_CONVERSATIONS: list[tuple[Any, str]] = [
    ([], "expected a text or a list of messages, found list without messages"),
    (["hello"], "expected a text or a list of messages, found list"),
    ([MESSAGE, {"role": "user"}], "found role str and content null"),
    ([MESSAGE, {"content": "hello"}], "found role null and content str"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "found role str and content list"),
    ([{"from": "human", "value": 3}], "found role str and content int"),
    ([{"role": "assistant", "content": "x"}], "chat template accepts, found TemplateError: the user speaks"),
]


@pytest.mark.parametrize(("conversation", "message"), REFUSED_CONVERSATIONS)
def test_conversations_that_cannot_be_rendered(
    conversation: Any, message: str, tmp_path: Path, chatting: Any
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": conversation}))
    said = told(tmp_path / "c.jsonl", chatting)
    assert "c.jsonl, line 1, column messages: expected" in said
    assert message in said


def test_a_tokenizer_without_a_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines([spoken(talk) for talk in TALKS], "messages"))
    said = told(tmp_path / "c.jsonl", tokenizer)
    assert "expected a tokenizer with a chat template for these messages, found none" in said
    assert "expected a tokenizer with a chat template" in told(tmp_path / "c.jsonl", None)


REFUSED: dict[str, tuple[bytes, str]] = {
    "missing.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "line 2: expected a column text, found body"),
    "null.jsonl": (b'{"text": "a"}\n\n{"text": null}\n', "line 3, column text: expected a text or a list of"),
    "number.jsonl": (b'{"text": 3}', "found int"),
    "object.jsonl": (b'{"text": {"a": 1}}', "found dict"),
    "other.jsonl": (
        b'{"id": 1, "body": "b"}',
        "expected a column text, messages, conversations or one that is named behind a colon, found id, body",
    ),
    "bare.jsonl": (b'"only a text"', "line 1: expected a record (a JSON object), found str"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2: expected a record in JSON, found Unterminated"),
    "prose.jsonl": (b"Once upon a time\n", "line 1: expected a record in JSON, found Expecting value at col"),
    "deep.jsonl": (b"[" * 100_000, "line 1: expected a record in JSON, found"),
    "deep.json": (b"[" * 100_000, "expected records in JSON, found"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: expected a record in JSON, found"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "expected a text in Unicode"),
    "empty.jsonl": (b"\n\n", "expected records, found none"),
    "empty.json": (b"[]", "expected records, found none"),
    "config.json": (b'{"model_type": "llama"}', "expected a column text, messages"),
    "numbers.json": (b"[1, 2]", "record 1: expected a record (a JSON object), found int"),
    "latin.jsonl": (b'{"text": "\xe4"}', "expected readable UTF-8"),
    "utf16.txt": ("a text".encode("utf-16"), "expected readable UTF-8, found the byte-order mark of UTF-16"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "found the byte-order mark of UTF-16"),
    "bare-utf16.txt": ("a text".encode("utf-16-le"), "expected a text, found binary data (NUL at character"),
    "latin.txt": (b"caf\xe9 au lait", "expected readable UTF-8"),
    "archive.txt": (b"PK\x03\x04\xff\xfe\x00", "expected readable UTF-8"),
    "zeros.txt": (b"abc\0\0", "NUL at character 3"),
    "empty.txt": (b"", "expected at least one window of 8 tokens, found 0 tokens"),
    "cut.txt.gz": (gzip.compress(b"def f(): pass\n" * 99)[:-9], "expected a readable file, found"),
    "garbled.jsonl.gz": (b"\x1f\x8b\x08" + b"x" * 50, "expected a readable file, found"),
    "plain.jsonl.gz": (b'{"text": "a"}', "expected a readable file, found Not a gzipped file"),
    "empty.parquet": (b"", "expected a readable Parquet file, found"),
    "text.parquet": (b"Once upon a time", "expected a readable Parquet file, found"),
    "plain.txt:body": (b"def f(): pass", "expected a file of records (.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    content, message = REFUSED[name]
    (tmp_path / name.removesuffix(":body")).write_bytes(content)
    said = told(tmp_path / name, tokenizer)
    assert name.removesuffix(":body") in said
    assert message in said


def test_parquet_columns_that_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    parquet(tmp_path / "null.parquet", ["a", None])
    parquet(tmp_path / "bytes.parquet", [b"a"])
    parquet(tmp_path / "body.parquet", ["a"], "body")
    parquet(tmp_path / "none.parquet", [], type=pyarrow.string())
    whole = (tmp_path / "body.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name, message in [
        ("null.parquet", "row 2, column text: expected a text or a list of messages, found null"),
        ("bytes.parquet", "row 1, column text: expected a text or a list of messages, found bytes"),
        ("body.parquet", "expected a column text, messages, conversations or one that is named behind a"),
        ("body.parquet:words", "expected a column words, found id, body"),
        ("none.parquet", "expected records, found none"),
        ("cut.parquet", "expected a readable Parquet file"),
    ]:
        assert message in told(tmp_path / name, tokenizer)


def test_what_is_no_text_at_all_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing").mkdir()
    folder(tmp_path / "others", {"weights.safetensors": b"x", "tokens.npy": b"x"})
    folder(tmp_path / "plain", {"a.txt": b"def f(): pass"})
    folder(tmp_path / "spoilt", {"a.txt": b"def f(): pass", "b.jsonl": b'{"body": "b"}'})
    for source, message in [
        (tmp_path / "nothing", "expected a folder with texts (.txt, .jsonl"),
        (tmp_path / "others", "found tokens.npy, weights.safetensors"),
        (f"{tmp_path / 'plain'}:body", "expected files of records (.jsonl"),
        (tmp_path / "spoilt", "b.jsonl, line 1: expected a column text"),
        (tmp_path / ("x" * 300 + ".txt"), "expected a readable file, found"),
        ("/dev/null", "expected a file or a folder, found neither"),
        ("", "found no such file"),
        *((tmp_path / f"absent{kind}", "found no such file") for kind in FILE_KINDS),
        *((tmp_path / f"absent{kind}:body", "found no such file") for kind in RECORD_KINDS),
    ]:
        assert message in told(source, tokenizer)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "expected a readable file, found [Errno 13]" in told(tmp_path / "plain" / "a.txt", tokenizer)
    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert "expected a readable folder, found [Errno 13]" in told(tmp_path / "plain", tokenizer)
    monkeypatch.setattr(Path, "exists", forbidden)
    assert "expected a readable file, found [Errno 13]" in told(tmp_path / "plain", tokenizer)


def test_the_library_that_parquet_needs_is_named(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a.parquet", DOCUMENTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "run pip install 'sparseswaps[parquet]'" in told(tmp_path / "a.parquet", tokenizer)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(words, min_size=1, max_size=6))
def test_documents_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    home = tmp_path_factory.mktemp("documents")
    (home / "a.jsonl").write_bytes(lines(documents))
    (home / "ascii.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in documents))
    parquet(home / "a.parquet", documents)
    for name in ("a.jsonl", "ascii.jsonl", "a.parquet"):
        assert list(read_documents(home / name)) == documents


@given(
    st.sampled_from([*FILE_KINDS, ".jsonl.gz", ".bin"]),
    st.sampled_from([b"", BOM, b'{"text": ', b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"PAR1", b"\x1f\x8b\x08"]),
    st.binary(max_size=80),
)
def test_any_bytes_are_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, kind: str, head: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{kind}"
    path.write_bytes(head + rest)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    said = ""
    try:
        evaluation_windows(path, tokenizer, 2)
    except ss.InvalidTextError as error:
        said = str(error)
    assert "\n" not in said


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, tokens=np.arange(100))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(np.arange(100), file)


def stored(array: np.ndarray) -> Callable[[Path], None]:
    def store(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=True)

    return store


def promised(path: Path) -> None:
    """A header that promises more than any memory holds."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (2**60,)}
        )


REFUSED_TOKENS: dict[str, tuple[Callable[[Path], None], str]] = {
    "archive": (archive, "expected one NumPy array, found an archive of arrays"),
    "zip": (zipped, "expected one NumPy array, found an archive of arrays"),
    "pickle": (pickled, "expected a NumPy array, found"),
    "objects": (
        stored(np.array([1, "a", None], dtype=object)),
        "expected a NumPy array, found Object arrays",
    ),
    "floats": (stored(np.ones(100)), "of integers, found 1 of float64"),
    "booleans": (stored(np.ones(100, dtype=bool)), "of integers, found 1 of bool"),
    "texts": (stored(np.array(["a", "b"])), "of integers, found 1 of <U1"),
    "times": (stored(np.arange(100).astype("timedelta64[s]")), "of integers, found 1 of timedelta64[s]"),
    "fields": (stored(np.zeros(100, dtype=[("a", int)])), "of integers, found 1 of [('a'"),
    "negative": (stored(np.arange(-1, 99)), "expected token ids of at least 0 that fit 64 bits, found -1 to"),
    "huge": (stored(np.array([2**63], dtype=np.uint64)), f"that fit 64 bits, found {2**63} to"),
    "nothing": (stored(np.zeros(0, dtype=int)), "expected tokens, found none (shape (0,))"),
    "no-rows": (stored(np.zeros((0, 16), dtype=int)), "expected tokens, found none (shape (0, 16))"),
    "scalar": (stored(np.array(7)), "of integers, found 0 of int64"),
    "cube": (stored(np.zeros((2, 3, 16), dtype=int)), "of integers, found 3 of int64"),
    "narrow": (stored(np.zeros((3, 4), dtype=int)), "expected windows of at least 8 tokens, found shape (3,"),
    "short": (stored(np.zeros(4, dtype=int)), "expected at least one window of 8 tokens, found 4 tokens"),
    "cut": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'") and None, "found"),
    "empty": (lambda path: path.write_bytes(b"") and None, "expected a NumPy array, found"),
    "promised": (promised, "expected a NumPy array, found"),
}


@pytest.mark.parametrize("name", REFUSED_TOKENS)
def test_token_files_that_are_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED_TOKENS[name]
    make(tmp_path / "tokens.npy")
    said = told(tmp_path / "tokens.npy", None)
    assert "tokens.npy: expected" in said
    assert message in said


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "uint32", "int64", "uint64"])
def test_integers_of_any_width_are_tokens(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(100).astype(dtype))
    found = evaluation_windows(tmp_path / "tokens.npy", None, 10)
    assert found.tokens.dtype == torch.int64
    assert found.tokens.flatten().tolist() == list(range(100))


def test_ids_that_the_model_does_not_have_are_refused_everywhere(tmp_path: Path) -> None:
    loaded = ss.load_model(DEMO_MODEL)
    size = loaded.model.get_input_embeddings().num_embeddings
    np.save(tmp_path / "tokens.npy", np.arange(size - 95, size + 1))
    message = rf"expected ids from 0 to {size - 1}, the vocabulary of .*, found {size - 95} to {size}"
    with pytest.raises(ss.InvalidTextError, match=message):
        ss.prune(DEMO_MODEL, calibration=tmp_path / "tokens.npy", samples=6, length=16)
    with pytest.raises(ss.InvalidTextError, match=message):
        ss.evaluate(loaded, tmp_path / "tokens.npy", length=16)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bert", "t5"])
def test_a_tokenizer_that_is_not_there_is_not_made_up(family: str, tmp_path: Path) -> None:
    """transformers gives an empty one, to which every word is unknown or none."""
    bare = tiny_models.save(family, tmp_path / family)
    (tmp_path / "a.txt").write_text(tiny_models.text(500))
    with pytest.raises(ss.InvalidTextError, match="expected a tokenizer beside the model, found none"):
        ss.prune(bare, calibration=tmp_path / "a.txt", samples=2, length=16)
    np.save(tmp_path / "a.npy", tiny_models.tokens(500).numpy())
    ss.prune(bare, calibration=tmp_path / "a.npy", samples=2, length=16, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*"))


def test_nothing_is_left_behind_where_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": null}')
    with pytest.raises(ss.InvalidTextError, match="found null"), warnings.catch_warnings():
        ss.prune(DEMO_MODEL, calibration=tmp_path / "bad.jsonl", out=tmp_path / "out", length=16)
    assert not (tmp_path / "out").exists()


def test_windows_without_room_for_text_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("def f(): pass\n" * 99)
    for length, limit in ((1, None), (0, None), (8, 0), (8, -1)):
        with pytest.raises(
            ss.InvalidTextError, match=r"evaluation windows: expected (length ≥ 2|a limit ≥ 1)"
        ):
            evaluation_windows(tmp_path / "a.txt", tokenizer, length, limit)
