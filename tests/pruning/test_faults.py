"""SIGKILL at any moment: the same command goes on, to the same masks, and no file is ever corrupt."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny_models
import torch
from safetensors import safe_open

from sparseswaps.masks.file import MASK_FILE, load_masks, verify_model
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.models.loading import load_model
from sparseswaps.pruning.run import prune
from sparseswaps.ranks import Ranks
from sparseswaps.records.run_database import RunDatabase

KILLS = {1: 14, 2: 6}


def check_files(folder: Path) -> None:
    """Whatever is there under its final name is whole."""
    if not folder.exists():
        return
    if (folder / RECORD_FILE).exists():
        with RunDatabase(folder / RECORD_FILE) as record:
            for layer in record.layers():
                packed = record.packed_mask(layer.name)
                assert packed is not None
                assert len(packed) == layer.rows * -(-layer.cols // 8)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                file.get_tensor(name)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.parametrize("count", sorted(KILLS))
def test_killed_at_random_moments(count: int, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(2000).numpy())
    dense = tiny_models.save("llama", tmp_path / "dense")
    arguments = {"calibration": tmp_path / "tokens.npy", "samples": 8, "length": 32}

    def start(out: Path) -> list[int]:
        def work(ranks: Ranks) -> None:
            prune(dense, **arguments, out=out, resume=True, ranks=ranks)

        if count == 1:
            return [processes.start(lambda: work(Ranks()), tmp_path / "result")]
        return processes.start_ranks(count, work, tmp_path / "results")

    prune(dense, **arguments, out=tmp_path / "warm")
    begin = time.monotonic()
    assert [processes.wait(child) for child in start(tmp_path / "whole")] == [0] * count
    duration = time.monotonic() - begin
    expected = load_masks(tmp_path / "whole")

    generator = random.Random(count)
    # one moment in each equal share of the run; where the machine is slower than before, some of them again
    moments = [(i + generator.random()) / KILLS[count] for i in range(KILLS[count])]
    out, runs = tmp_path / "killed-0", 0
    for moment in moments:
        if (out / MASK_FILE).exists():
            out, runs = tmp_path / f"killed-{runs + 1}", runs + 1
        children = start(out)
        time.sleep(moment * duration)
        # with several processes any one of them is lost first
        order = generator.sample(children, count)
        os.kill(order[0], signal.SIGKILL)
        for child in order[1:]:
            time.sleep(0.02)
            os.kill(child, signal.SIGKILL)
        for child in children:
            assert processes.wait(child) in (-signal.SIGKILL, 0, 1)
        check_files(out)
    for number in range(runs + 1):
        out = tmp_path / f"killed-{number}"
        if not (out / MASK_FILE).exists():
            assert [processes.wait(child) for child in start(out)] == [0] * count
            assert not list(out.glob(".partial*"))
        found = load_masks(out)
        assert found.masks.keys() == expected.masks.keys()
        assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
        assert verify_model(load_model(out, dtype="checkpoint").model, found).ok
        check_files(out)
