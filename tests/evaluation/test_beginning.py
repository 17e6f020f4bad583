"""Windows that begin with the beginning-of-text token: decided, stated, measured as by plain transformers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import processes
import pytest
import tiny_models
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows, evaluation_windows
from sparseswaps.evaluation.beginning import AddBos, Beginning, decide_beginning
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.masks.saving import SETTINGS_FILE
from sparseswaps.ranks import Ranks
from sparseswaps.records.run import LayerRecord
from sparseswaps.records.run_database import RunDatabase
from sparseswaps.study import StudyDatabase, parse_study, run_study
from sparseswaps.study.problems import DEMO_MODEL

BOS = 1
LENGTH = 24
STEPS = 150
OPTIONS = {"samples": 12, "length": LENGTH, "solver": "wanda", "device": "cpu"}


def train(model: nn.Module) -> None:
    """Teach the text to a model where windows begin with the token, and nothing where they do not."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    stream = tiny_models.tokens(20_000)
    for _ in range(STEPS):
        starts = torch.randint(0, len(stream) - LENGTH, (12,), generator=generator)
        text = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
        guess = torch.randint(4, tiny_models.VOCABULARY, text.shape, generator=generator)
        begun = torch.cat([torch.full((12, 1), BOS), text], 1)
        logits = model(torch.cat([begun, torch.cat([text, text[:, :1]], 1)])).logits
        targets = torch.cat([text, guess])
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its text only behind the token, one that knows nothing, and texts."""
    folder = tmp_path_factory.mktemp("home")
    tiny_models.save("llama", folder / "indifferent")
    needy = tiny_models.save("llama", folder / "needy")
    model = transformers.AutoModelForCausalLM.from_pretrained(needy)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.div_(3)
    train(model)
    model.eval().save_pretrained(needy)
    (folder / "text.txt").write_text(tiny_models.text(1500, seed=5))
    (folder / "other.txt").write_text(tiny_models.text(1700, seed=6))
    return folder


def by_hand(model: Path | str, text: Path, length: int, bos: int | None) -> float:
    """Perplexity of a text with plain transformers: windows one by one, the token never predicted."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    front = [] if bos is None else [bos]
    step = length - len(front)
    losses = []
    for start in range(0, len(ids) - step + 1, step):
        window = torch.tensor([front + ids[start : start + step]])
        with torch.no_grad():
            losses.append(float(plain(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


class Recorded:
    """Keeps what a run announces."""

    def __init__(self) -> None:
        self.said: list[object] = []

    @property
    def beginning(self) -> Beginning:
        (found,) = [each for each in self.said if isinstance(each, Beginning)]
        return found


def test_auto_adds_the_token_where_the_model_needs_it(home: Path, tmp_path: Path) -> None:
    """Dense and pruned perplexity, of the run and of the saved models, are those of plain transformers."""
    told, out = Recorded(), tmp_path / "out"
    report = ss.prune(
        home / "needy",
        **OPTIONS,
        calibration=home / "text.txt",
        evaluation=home / "other.txt",
        announce=told.said.append,
        out=out,
    )
    dense, pruned = (by_hand(x, home / "other.txt", LENGTH, BOS) for x in (home / "needy", out))
    assert report.perplexity_dense == pytest.approx(dense, rel=1e-6)
    assert report.perplexity_pruned == pytest.approx(pruned, rel=1e-6)
    # the model was made so that it matters by more than half a nat
    assert math.log(by_hand(home / "needy", home / "other.txt", LENGTH, None)) - math.log(dense) > 0.5
    assert told.beginning.added
    assert str(told.beginning).startswith(
        "beginning-of-text token: in front of every window (auto: loss of 2"
    )
    assert report.settings.add_bos is AddBos.YES
    assert report.to_json()["add_bos"] == "yes"
    assert 'add_bos = "yes"' in (out / SETTINGS_FILE).read_text()
    with RunDatabase(out / RECORD_FILE) as record:
        assert record.facts()["settings"]["add_bos"] == record.facts()["report"]["add_bos"] == "yes"
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "needy")
    windows = calibration_windows(home / "text.txt", tokenizer, 12, LENGTH, bos=True)
    assert report.calibration_hash == windows.hash
    for model, expected in ((home / "needy", dense), (out, pruned)):
        for offload in (False, True):
            found = ss.evaluate(model, home / "other.txt", length=LENGTH, offload=offload)
            assert found.perplexity == pytest.approx(expected, rel=1e-6)
            assert found.beginning.added


def test_auto_keeps_the_protocol_where_the_token_does_not_matter(home: Path, tmp_path: Path) -> None:
    told = Recorded()
    (tmp_path / "text.py").write_text(Path(json.__file__).read_text())
    (tmp_path / "other.py").write_text(Path(json.decoder.__file__).read_text())
    options = {**OPTIONS, "length": 64, "include": ("*.0.*",)}
    report = ss.prune(
        DEMO_MODEL,
        **options,
        calibration=tmp_path / "text.py",
        evaluation=tmp_path / "other.py",
        announce=told.said.append,
        out=tmp_path / "out",
    )
    for model, found in ((DEMO_MODEL, report.perplexity_dense), (tmp_path / "out", report.perplexity_pruned)):
        assert found == pytest.approx(by_hand(model, tmp_path / "other.py", 64, None), rel=1e-6)
    assert report.settings.add_bos is AddBos.NO
    assert str(told.beginning).startswith("beginning-of-text token: none (auto: loss of 2 windows")


def test_what_is_asked_for_is_done(home: Path) -> None:
    text = home / "other.txt"
    for model in ("needy", "indifferent"):
        for choice, bos in (("yes", BOS), ("no", None)):
            found = ss.evaluate(home / model, text, length=LENGTH, add_bos=choice)
            assert found.perplexity == pytest.approx(by_hand(home / model, text, LENGTH, bos), rel=1e-6)
            assert found.beginning.add_bos == choice
    with pytest.raises(ss.InputError, match="add_bos: expected one of auto, yes, no, found 'maybe'"):
        ss.evaluate(home / "needy", text, add_bos="maybe")


def test_a_window_is_the_token_and_the_text(home: Path) -> None:
    """As long as any, so that positions suffice, and every token of the text is predicted once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "needy")
    ids = tiny_models.tokens(1700, seed=6)
    for length in (2, 7, 64):
        found = evaluation_windows(home / "other.txt", tokenizer, length, bos=True)
        count = 1700 // (length - 1)
        assert found.tokens.shape == (count, length)
        assert torch.equal(found.tokens[:, 0], torch.full((count,), BOS))
        assert torch.equal(found.tokens[:, 1:].flatten(), ids[: count * (length - 1)])
        chosen = calibration_windows(home / "other.txt", tokenizer, 9, length, bos=True)
        assert {tuple(x) for x in chosen.tokens.tolist()} <= {tuple(x) for x in found.tokens.tolist()}


def test_token_files_and_windows_get_the_token_once(home: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "needy")
    rows = tiny_models.tokens(80).view(4, 20)
    np.save(tmp_path / "stream.npy", rows.flatten().numpy())
    np.save(tmp_path / "rows.npy", rows.numpy())
    begun = rows.clone()
    begun[::2, 0] = BOS
    np.save(tmp_path / "begun.npy", begun.numpy())
    stream = evaluation_windows(tmp_path / "stream.npy", tokenizer, 11, bos=True).tokens
    assert torch.equal(stream[:, 1:], rows.view(8, 10))
    front = torch.full((4, 1), BOS)
    plain = torch.cat([front, rows[:, :9]], 1)
    assert torch.equal(evaluation_windows(tmp_path / "rows.npy", tokenizer, 10, bos=True).tokens, plain)
    found = evaluation_windows(tmp_path / "begun.npy", tokenizer, 10, bos=True)
    assert torch.equal(found.tokens[::2], begun[::2, :10])
    assert torch.equal(found.tokens[1::2], plain[1::2])
    given = ss.Windows(begun[:, :10], "given", 4)
    assert torch.equal(given.with_bos(tokenizer).tokens, found.tokens)
    # windows that are given are begun as files are
    options = {"calibration": ss.Windows(rows[:, :10], "rows", 4), "evaluation": given, "solver": "wanda"}
    report = ss.prune(home / "needy", **options, add_bos="yes")
    assert report.calibration_hash == ss.Windows(plain, "", 4).hash
    asked = ss.evaluate(home / "needy", found, add_bos="no").perplexity
    assert report.perplexity_dense == pytest.approx(asked, rel=1e-6)


@pytest.fixture
def nameless(home: Path, tmp_path: Path) -> Path:
    """The model that needs the token, with a tokenizer that has none."""
    folder = tmp_path / "nameless"
    transformers.AutoModelForCausalLM.from_pretrained(home / "needy").save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "needy")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).bos_token_id is None
    return folder


def test_a_tokenizer_without_the_token(home: Path, nameless: Path, tmp_path: Path) -> None:
    told = Recorded()
    texts = {"calibration": home / "text.txt"}
    report = ss.prune(nameless, **OPTIONS, **texts, announce=told.said.append)
    assert report.settings.add_bos is AddBos.NO
    assert str(told.beginning) == "beginning-of-text token: none (the tokenizer has none)"
    message = r"beginning-of-text token: expected a tokenizer that has one \(bos_token\), found one without"
    with pytest.raises(ss.InvalidTextError, match=message):
        ss.prune(nameless, **OPTIONS, **texts, add_bos="yes", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ss.InvalidTextError, match=message):
        ss.evaluate(nameless, home / "text.txt", length=LENGTH, add_bos="yes")
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(300).numpy())
    bare = tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(ss.InvalidTextError, match="found no tokenizer beside the model"):
        ss.prune(bare, **OPTIONS, calibration=tmp_path / "tokens.npy", add_bos="yes")


def test_encoders_are_as_they_were(home: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "needy")
    bert = tiny_models.save("bert", tmp_path / "bert")
    tokenizer.save_pretrained(bert)
    report = ss.prune(bert, **OPTIONS, calibration=home / "text.txt")
    windows = calibration_windows(home / "text.txt", tokenizer, 12, LENGTH, special_tokens=True)
    assert report.calibration_hash == windows.hash
    assert report.settings.add_bos is AddBos.NO
    with pytest.raises(ss.InvalidTextError, match="expected a causal model, found one whose windows have"):
        ss.prune(bert, **OPTIONS, calibration=home / "text.txt", add_bos="yes")


def test_a_token_that_the_model_does_not_know_is_not_tried(home: Path) -> None:
    loaded = ss.load_model(home / "needy")
    loaded.tokenizer.add_special_tokens({"bos_token": "<new>"})
    windows = evaluation_windows(home / "other.txt", loaded.tokenizer, LENGTH)
    decided = decide_beginning(loaded, AddBos.AUTO, windows)
    assert decided == Beginning(False, "the model does not know it")
    with pytest.raises(ss.InvalidTextError, match=r"expected ids from 0 to 63, .* found 4 to 64"):
        ss.evaluate(loaded, home / "other.txt", length=LENGTH, add_bos="yes")


@pytest.mark.parametrize(
    ("losses", "added"),
    [((3.0, 2.49), True), ((3.0, 2.51), False), ((2.0, 3.0), False), ((9.0, math.nan), False)],
)
def test_half_a_nat_decides(
    losses: Sequence[float], added: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def measured(_: object, windows: Tensor) -> float:
        asked.append(windows)
        return math.exp(losses[len(asked) - 1])

    monkeypatch.setattr(sys.modules["sparseswaps.evaluation.beginning"], "model_perplexity", measured)
    loaded = ss.load_model(home / "indifferent")
    windows = evaluation_windows(home / "other.txt", loaded.tokenizer, LENGTH)
    assert decide_beginning(loaded, AddBos.AUTO, windows).added is added
    without, with_it = asked
    assert torch.equal(without, windows.tokens[:2])
    assert torch.equal(with_it, torch.cat([torch.full((2, 1), BOS), windows.tokens[:2, :-1]], 1))


class Interrupting:
    """Presses Ctrl-C after some layers."""

    def stage(self, text: str, done: int, total: int) -> None: ...

    def layer_started(self, name: str) -> None: ...

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        raise KeyboardInterrupt


def test_a_run_is_resumed_and_repeated_as_it_was_decided(home: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "calibration": home / "text.txt", "evaluation": home / "other.txt"}
    whole = ss.prune(home / "needy", **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ss.prune(home / "needy", **options, out=tmp_path / "cut", progress=Interrupting())
    with pytest.raises(ss.InputError, match=r"found another add_bos \(no instead of yes\)"):
        ss.prune(home / "needy", **options, add_bos="no", out=tmp_path / "cut", resume=True)
    resumed = ss.prune(home / "needy", **options, add_bos="yes", out=tmp_path / "cut", resume=True)
    settings = ss.PruneSettings.parse((tmp_path / "whole" / SETTINGS_FILE).read_text())
    told = Recorded()
    repeated = ss.prune(home / "needy", settings, device="cpu", announce=told.said.append)
    assert str(told.beginning) == "beginning-of-text token: in front of every window (as asked for)"
    for report in (resumed, repeated):
        assert report.calibration_hash == whole.calibration_hash
        assert report.perplexity_pruned == whole.perplexity_pruned
        assert report.settings.plain() == whole.settings.plain()


def test_a_pruned_model_is_measured_as_it_was_pruned(home: Path, tmp_path: Path) -> None:
    """Whatever its own loss would say: so that dense and pruned are compared."""
    out = tmp_path / "out"
    ss.prune(home / "needy", **OPTIONS, calibration=home / "text.txt", add_bos="no", out=out)
    found = ss.evaluate(out, home / "other.txt", length=LENGTH)
    assert found.beginning == Beginning(False, f"as {SETTINGS_FILE} of the model says")
    assert found.perplexity == pytest.approx(by_hand(out, home / "other.txt", LENGTH, None), rel=1e-6)
    # a file of that name that says nothing of it
    for content in ("add_bos = true", "colour = 1", "no TOML at all", "\xff"):
        (out / SETTINGS_FILE).write_text(content, encoding="latin-1")
        assert "auto: loss of" in ss.evaluate(out, home / "other.txt", length=LENGTH).beginning.reason


def test_the_first_process_decides_for_all(home: Path, tmp_path: Path) -> None:
    """Three processes give the run of one; the others do not compare losses."""
    options = {**OPTIONS, "calibration": home / "text.txt", "evaluation": home / "other.txt"}
    alone = ss.prune(home / "needy", **options)

    def work(ranks: Ranks) -> ss.PruneReport:
        module: Any = sys.modules["sparseswaps.evaluation.beginning"]
        if not ranks.first:
            module.model_perplexity = None
        return ss.prune(home / "needy", **options, machine=ss.Machine(device="cpu", ranks=ranks))

    children = processes.start_ranks(3, work, tmp_path / "ranks")
    assert [processes.wait(child) for child in children] == [0, 0, 0]
    for report in processes.results(tmp_path / "ranks", range(3)):
        assert report.settings == alone.settings
        assert report.calibration_hash == alone.calibration_hash
        assert report.perplexity_pruned == alone.perplexity_pruned


def run(*words: object) -> None:
    assert command_line.run(*words) == 0


def test_the_commands_say_what_was_decided(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    line = "beginning-of-text token: in front of every window (auto: loss of 2 windows "
    windows = ("--samples", 12, "--length", LENGTH)
    run("prune", "needy", "--calibration", "text.txt", "--evaluation", "other.txt", *windows)
    said = capsys.readouterr()
    assert said.err.count(line) == 1
    assert "tokens, beginning-of-text token first" in " ".join(said.out.split())
    run("prune", "needy", "--calibration", "text.txt", "--add-bos", "no", *windows, "--json")
    said = capsys.readouterr()
    assert "beginning-of-text token: none (as asked for)" in said.err
    assert json.loads(said.out)["add_bos"] == "no"
    run("evaluate", "needy", "--evaluation", "other.txt", "--length", LENGTH, "--json")
    said = capsys.readouterr()
    assert said.err.count(line) == 1
    assert json.loads(said.out)["add_bos"] == "yes"
    run("evaluate", "needy", "--evaluation", "other.txt", "--length", LENGTH, "--add-bos", "no")
    assert "add_bos no" in " ".join(capsys.readouterr().out.split())
    for words, expected in (((), "yes"), (("--add-bos", "no"), "no")):
        out = tmp_path / expected
        run(
            "extract",
            "needy",
            "--calibration",
            "text.txt",
            "--layers",
            "*0*q_proj",
            "--out",
            out,
            *windows,
            *words,
        )
        assert ("auto: loss of" in capsys.readouterr().err) == (expected == "yes")
        (file,) = out.iterdir()
        with safe_open(file, "pt") as instance:
            assert f'"add_bos": "{expected}"' in json.dumps(instance.metadata()).replace("\\", "")


def test_studies_decide_and_sweep(home: Path, tmp_path: Path) -> None:
    """Runs and extracted layers: of what is asked for, or of what the model needs."""
    model = {
        "model": "needy", "calibration": "text.txt", "evaluation": "other.txt", "samples": [12],
        "length": LENGTH, "add_bos": ["auto", "yes", "no"],
    }  # fmt: skip
    problem = {
        "model": "needy", "calibration": "text.txt", "held_out": "other.txt", "samples": [12],
        "length": LENGTH, "include": ["*.0.*q_proj"],
    }  # fmt: skip
    values = {
        "name": "begun",
        "solver": [{"solver": "wanda"}],
        "model": [model],
        "problem": [{**problem, "name": name, "add_bos": name} for name in ("auto", "yes", "no")],
    }
    outcome = run_study(parse_study(values, home), tmp_path / "s.sqlite", jobs=1, backend="sequential")
    assert outcome.failed == 0
    with StudyDatabase(tmp_path / "s.sqlite") as database:
        rows = database.read()
    # how windows begin is held fixed where methods are compared, as their length is
    assert sorted((run.option("add_bos"), run.fitted) for run in rows.models) == [
        ("no", "sequential"), ("yes", "sequential"), ("yes", "sequential"),
    ]  # fmt: skip
    assert len({run.setting for run in rows.models}) == 2
    found = {row.source: (row.objective, row.held_out) for row in rows.units}
    assert found["auto"] == found["yes"]
    assert found["auto"][0] != found["no"][0]
    assert found["auto"][1] != found["no"][1]
    with pytest.raises(ss.InputError, match=r"key problem\[0\].add_bos: .*one of auto, yes, no, found 'on'"):
        parse_study({**values, "problem": [{**problem, "add_bos": "on"}]}, home)
