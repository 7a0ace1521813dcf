"""What a third adversary found, with the issue on crash-proofness in hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import recipe, surefoot, surefoot_process
from test_cli import write
from test_machine import WORKERS, kinds, wait_for_steps

import surefoot as sf
from surefoot.checkpoint.files import to_json
from surefoot.checkpoint.kept import Checkpoint
from surefoot.checkpoint.store import DirectoryStore

OFTEN = sf.Operations(checkpoint={"every": 4})


def left_at(path: Path, step: int, operations: sf.Operations = OFTEN, **changes) -> None:
    for outcome in sf.steps(recipe(**changes), out=path, operations=operations):
        if outcome.step == step:
            break


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    with file.open("r+b") as opened:  # in place: whoever shares the file shares the damage
        opened.write(data)


def test_lost_events_do_not_make_later_checkpoints_a_zombies(tmp_path):
    path = tmp_path / "run"
    for stop in (3, 7, 9):
        left_at(path, stop, until=20)
    (path / "events.jsonl").unlink()
    done = sf.fit(recipe(until=20), out=path, operations=OFTEN)
    again = sf.fit(recipe(until=20), out=path, operations=OFTEN)
    assert (again.status, again.digest) == ("finished", done.digest)
    assert not (path / "quarantine").exists()


def test_a_later_checkpoint_format_is_refused_not_put_away(tmp_path):
    path = tmp_path / "run"
    left_at(path, 9)
    newest: Checkpoint = sf.open_run(path).checkpoints()[-1]
    file = newest.path / "MANIFEST.json"
    manifest = {**json.loads(file.read_text()), "schema": 3}
    del manifest["self"]
    file.write_bytes(to_json({**manifest, "self": hashlib.sha256(to_json(manifest)).hexdigest()}))
    with pytest.raises(sf.StateError, match="has format 3; this version reads 2"):
        sf.fit(recipe(), out=path)
    assert newest.path.is_dir()


def test_a_damaged_frozen_file_is_not_linked_any_further(tmp_path):
    changes = {"groups": (sf.Group("0.*", freeze=True),), "until": 40}
    path = tmp_path / "run"
    for outcome in sf.steps(recipe(**changes), out=path, operations=OFTEN):
        if outcome.step == 14:
            time.sleep(0.2)
            first = sf.open_run(path).checkpoints()[0].path / "frozen.safetensors"
            damage(first)
    sound = [c for c in sf.open_run(path).checkpoints() if c.step > 20]
    for checkpoint in sound:
        checkpoint.verify()
    assert len(sound) >= 2


def test_a_lost_run_json_is_made_again(tmp_path, fit):
    path = tmp_path / "run"
    left_at(path, 9)
    (path / "run.json").unlink()
    assert sf.fit(recipe(), out=path).digest == fit().digest
    assert sf.open_run(path).verify() == []
    left_at(tmp_path / "other", 9)
    (tmp_path / "other/run.json").unlink()
    with pytest.raises(sf.UsageError, match="holds no run"):
        sf.fit(recipe(seed=5), out=tmp_path / "other")


def test_checkpoints_close_together_are_certified_too(tmp_path):
    operations = sf.Operations(checkpoint={"every": 10, "keep_last": 3})
    for outcome in sf.steps(recipe(until=400), out=tmp_path / "run", operations=operations):
        while outcome.step == 20 and not sf.open_run(tmp_path / "run").checkpoints():
            time.sleep(0.01)  # written in the background, by a disk that may be slow
    kept = sf.open_run(tmp_path / "run").checkpoints()
    assert any(c.mark("certified").exists() for c in kept)
    assert len(kept) <= 4


def test_a_spent_budget_keeps_the_same_state_once(tmp_path):
    operations = sf.Operations(checkpoint={"every": 4}, budget={"updates": 8})
    for _ in range(3):
        done = sf.fit(recipe(), out=tmp_path / "run", operations=operations)
        assert done.status == "budget"
    assert [c.step for c in sf.open_run(tmp_path / "run").checkpoints()] == [4, 8]


def test_a_retry_is_one_try(tmp_path, monkeypatch):
    real, calls = DirectoryStore.save, []

    def save(self, snapshot, step):
        calls.append(step)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        time.sleep(0.3)
        return real(self, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", save)
    monkeypatch.setattr("surefoot.keep._BACK_OFF_S", (0.01, 0.01))
    for _ in sf.steps(
        recipe(until=60), out=tmp_path / "run", operations=sf.Operations(checkpoint={"every": 10})
    ):
        time.sleep(0.005)
    assert len(calls) == len(set(calls)) <= 7


def test_a_diverged_run_says_what_it_rejected(tmp_path):
    file = write(tmp_path, "optimizer=sf.SGD(lr=1e38), until='100ep'")
    first = surefoot("train", file, "--out", tmp_path / "run", "--set", "checkpoint.every=2")
    assert first.returncode == 3
    damage(sf.open_run(tmp_path / "run").checkpoints()[-1].path / "model.safetensors")
    again = surefoot("train", file, "--out", tmp_path / "run")
    assert again.returncode == 3
    assert "rejected" in again.stderr


HANG = """
import os, time
real = os.fsync
def fsync(fd):
    while os.path.exists(os.environ["HANG"]):
        time.sleep(0.1)
    return real(fd)
os.fsync = fsync
"""


def test_a_disk_that_hangs_does_not_hold_up_sigterm(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HANG)
    (tmp_path / "mine.py").write_text(WORKERS.replace("{trouble}", "pass").replace('"3ep"', '"9999ep"'))
    process = surefoot_process(
        "train", "mine.py", "--out", "run", "--set", "checkpoint.every=1s", "--set", "checkpoint.grace=2s",
        cwd=tmp_path, fresh=True, env={"PYTHONPATH": str(tmp_path), "HANG": str(tmp_path / "hang")},
    )  # fmt: skip
    try:
        wait_for_steps(tmp_path / "run", 10, process)
        while "checkpointed" not in kinds(tmp_path / "run"):
            time.sleep(0.05)
        (tmp_path / "hang").touch()
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 75
    (tmp_path / "hang").unlink()


def test_a_step_that_does_not_end_does_not_hold_up_sigterm(tmp_path):
    code = WORKERS.replace("{trouble}", "pass").replace(
        "objective=sf.supervised(F.cross_entropy)", "objective=objective"
    )
    code = code.replace(
        "def recipe",
        "STEPS = [0]\n"
        "def objective(model, data):\n"
        "    STEPS[0] += 1\n"
        "    if STEPS[0] > 20: open('asleep', 'w').close(); time.sleep(600)\n"
        "    return F.cross_entropy(model(data[0]), data[1], reduction='none')\n"
        "def recipe",
    )
    (tmp_path / "mine.py").write_text(code)
    process = surefoot_process(
        "train", "mine.py", "--out", "run", "--set", "checkpoint.every=5", "--set", "checkpoint.grace=1s",
        cwd=tmp_path,
    )  # fmt: skip
    wait_for_steps(tmp_path / "run", 20, process)
    view = sf.open_run(tmp_path / "run")
    while not view.checkpoints() or view.checkpoints()[-1].step < 20 or not (tmp_path / "asleep").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert (view.status, view.checkpoints()[-1].step) == ("preempted", 20)
    assert "no step ended within checkpoint.grace" in view.summary()["reason"]


def test_the_supervisor_tells_machine_and_user_apart(tmp_path):
    (tmp_path / "mine.py").write_text(WORKERS.replace("{trouble}", "pass"))
    train = ("--", "train", "mine.py", "--out", "run", "--set", "checkpoint.every=5")
    first = surefoot("supervise", *train, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    for kept in sf.open_run(tmp_path / "run").checkpoints():
        damage(kept.path / "model.safetensors")
    hopeless = surefoot("supervise", "--pause", "0.05", *train, cwd=tmp_path)
    assert hopeless.returncode == 1
    assert "starting again would not help" in hopeless.stderr
    assert hopeless.stderr.count("none is sound") == 2  # the training's own message, and the supervisor's


def test_a_full_disk_at_the_start_is_told_and_tried_again(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=256k tmpfs {small} 2>/dev/null")
    if mounted != 0:
        pytest.skip("not run: needs the right to mount a tmpfs")
    try:
        (tmp_path / "mine.py").write_text(WORKERS.replace("{trouble}", "pass"))
        train = ("train", "mine.py", "--out", small / "run")
        full = surefoot(*train, cwd=tmp_path)
        assert full.returncode == 1
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr
        assert not (small / "run").exists()
        crashes = ("--crashes", "2", "--pause", "0.05")
        tried = surefoot("supervise", *crashes, "--", *train, cwd=tmp_path)
        assert tried.returncode == 1
        assert "(disk)" in tried.stderr
    finally:
        os.system(f"umount {small}")


def test_a_full_disk_in_the_middle_of_a_run(tmp_path):
    """A real one: the run's own file system, filled by somebody else and then cleared."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=6m tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("not run: needs the right to mount a tmpfs")
    try:
        for outcome in sf.steps(
            recipe(until=400), out=small / "run", operations=sf.Operations(checkpoint={"every": "0.1s"})
        ):
            if outcome.step == 30:
                filler = (small / "filler").open("wb", buffering=0)
                try:
                    while filler.write(bytes(1 << 16)):
                        pass
                except OSError:
                    pass
            if outcome.step == 200:
                filler.close()
                (small / "filler").unlink()
            time.sleep(0.01)
        view = sf.open_run(small / "run")
        assert view.status == "finished"
        assert "checkpoint_failed" in kinds(small / "run")
        assert view.verify() == []
        shutil.copytree(small / "run", tmp_path / "copy")
    finally:
        os.system(f"umount {small}")
    assert torch.isfinite(torch.tensor(sf.open_run(tmp_path / "copy").log()["loss"])).all()
