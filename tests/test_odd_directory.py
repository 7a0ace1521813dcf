"""What else may lie in a run's directory, or cannot be moved, removed or written there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import blobs, mlp, recipe, surefoot

import surefoot as sf
from surefoot.checkpoint import store as stores
from surefoot.checkpoint.kept import Checkpoint, list_checkpoints
from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import RunDirectoryError
from surefoot.guard.hang import HangWatch
from surefoot.record.folder import RunFolder
from surefoot.release import release

EVERY = {"every": 10, "keep_last": 2}


def trained(out, *, until=100, updates=None, checkpoint=EVERY, **changes):
    budget = {} if updates is None else {"updates": updates}
    operations = sf.Operations(checkpoint=checkpoint, budget=budget, progress="off")
    return sf.fit(recipe(until=until, **changes), out=out, operations=operations)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    done = trained(tmp_path_factory.mktemp("whole") / "run")
    return done.digest, done.ledger


def told(out, kind):
    return [e for e in sf.open_run(out).events(all_events=True) if e["kind"] == kind]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_disk_that_takes_no_mark_does_not_end_the_run(tmp_path, monkeypatch):
    touch, refused = Path.touch, []

    def read_only_at_first(path, *of, **how):
        if path.suffix == ".certified" and len(refused) < 2:
            refused.append(path)
            raise OSError(errno.EROFS, "Read-only file system")
        touch(path, *of, **how)

    monkeypatch.setattr(Path, "touch", read_only_at_first)
    assert trained(tmp_path / "run", until=2000, checkpoint={"every": 100}).status == "finished"
    assert len(refused) == 2
    assert any(c.mark("certified").exists() for c in sf.open_run(tmp_path / "run").checkpoints())


def test_one_that_cannot_be_removed_is_told_of_and_holds_no_other_back(tmp_path, monkeypatch, whole):
    rename = os.rename

    def busy(old, new):
        if "000002-" in str(new):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "rename", busy)
        done = trained(tmp_path / "run", updates=80)
        assert [c.step for c in sf.open_run(tmp_path / "run").checkpoints()] == [20, 70, 80]
    (event,) = told(tmp_path / "run", "checkpoint_stuck")
    assert event["name"] == "000002-000000020"
    assert "busy" in event["error"]
    assert "checkpoint-failed" in surefoot("explain", tmp_path / "run").stdout
    done = trained(tmp_path / "run")
    assert (done.digest, done.ledger) == whole
    assert [c.step for c in sf.open_run(tmp_path / "run").checkpoints()] == [90, 100]


def test_a_damaged_one_that_cannot_be_moved_away_keeps_nobody_from_going_on(tmp_path, whole):
    trained(tmp_path / "run", updates=50)
    flip(tmp_path / "run/checkpoints/000005-000000050/model.safetensors")
    (tmp_path / "run/quarantine").touch()
    done = trained(tmp_path / "run")
    assert (done.digest, done.ledger) == whole
    (event,) = told(tmp_path / "run", "checkpoint_rejected")
    assert "could not be moved to quarantine/" in event["reason"]


def test_names_that_are_taken_are_passed_over(tmp_path, whole, monkeypatch):
    folder = tmp_path / "run/checkpoints"
    for outcome in sf.steps(
        recipe(until=100), out=tmp_path / "run", operations=sf.Operations(checkpoint=EVERY)
    ):
        if outcome.step == 45:
            for digits in (10, 18, 240):
                (folder / f"{'9' * digits}-000000001").mkdir()
            (folder / "000006-000000060").touch()
            (folder / "000010-000000100").touch()
            held = folder / ".tmp-000011-000000100"
            monkeypatch.setattr("shutil.rmtree", held_by_others(held))
            held.mkdir()
    view = sf.open_run(tmp_path / "run")
    assert (view.summary()["digest"], view.summary()["ledger"]) == whole
    assert view.checkpoints()[-1].path.name == "000012-000000100"
    assert told(tmp_path / "run", "checkpoint_failed") == []
    assert view.verify() == []


def held_by_others(held):
    rmtree = shutil.rmtree

    def remove(path, *of, **how):
        if Path(path) == held:
            raise OSError(errno.EPERM, "Operation not permitted")
        rmtree(path, *of, **how)

    return remove


def test_a_folder_in_place_of_the_ballast(tmp_path, monkeypatch, whole):
    save, failed = DirectoryStore.save, []

    def full_once(store, snapshot, step):
        if step == 30 and not failed:
            failed.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(store, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", full_once)
    (tmp_path / "run").mkdir()
    operations = sf.Operations(checkpoint=EVERY)
    for outcome in sf.steps(recipe(until=100), out=tmp_path / "run", operations=operations):
        if outcome.step == 12:
            (tmp_path / "run/BALLAST").unlink()
            (tmp_path / "run/BALLAST").mkdir()
    assert failed
    assert sf.open_run(tmp_path / "run").summary()["digest"] == whole[0]


def test_a_checkpoint_that_goes_while_a_live_run_is_verified_is_no_finding(tmp_path, monkeypatch):
    trained(tmp_path / "run", updates=50)
    view = sf.open_run(tmp_path / "run")
    kept, gone = view.checkpoints(), tmp_path / "run/checkpoints/000001-000000010"
    monkeypatch.setattr(type(view), "checkpoints", lambda self: [Checkpoint(1, 10, gone), *kept])
    assert [f.file for f in view.verify()] == ["checkpoints/000001-000000010/MANIFEST.json"]
    monkeypatch.setattr(RunFolder, "is_running", lambda self: True)
    assert view.verify() == []


def test_verify_beside_a_run_that_lets_checkpoints_go(tmp_path):
    """For real: one checkpoint per step, of which two stay."""
    done, found, rounds = threading.Event(), [], []

    def watch():
        while not done.is_set():
            if (tmp_path / "run/events.jsonl").exists():
                try:
                    found.extend(
                        f for f in sf.open_run(tmp_path / "run").verify() if "checkpoints" in f.file
                    )
                except Exception as error:  # is told below
                    found.append(error)
                rounds.append(1)
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        trained(tmp_path / "run", until=150, checkpoint={"every": 1, "keep_last": 2})
    finally:
        done.set()
        watching.join()
    assert rounds
    assert found == []


def test_hidden_files_within_a_checkpoint_are_nobodys_business(tmp_path, whole):
    trained(tmp_path / "run", updates=50)
    for checkpoint in list_checkpoints(tmp_path / "run/checkpoints"):
        (checkpoint.path / ".DS_Store").touch()
    assert sf.open_run(tmp_path / "run").verify() == []
    assert trained(tmp_path / "run").digest == whole[0]
    newest = sf.open_run(tmp_path / "run").checkpoints()[-1]
    (newest.path / "frozen.safetensors").touch()  # this one would be read
    assert [f.what for f in sf.open_run(tmp_path / "run").verify()] == ["the file is foreign"]


def test_a_damaged_older_checkpoint_does_not_keep_samples_from_being_released(tmp_path):
    x, y = blobs(64, seed=1)
    x[7] = float("nan")
    changed = {"data": sf.Arrays(x, y), "batch": sf.Batch(16), "model": mlp}
    trained(tmp_path / "run", updates=50, **changed)
    (tmp_path / "run/checkpoints/000004-000000040/MANIFEST.json").unlink()
    assert release(tmp_path / "run") == ([7], 50)


def test_what_cannot_be_moved_aside_is_said(tmp_path, monkeypatch):
    trained(tmp_path / "run", updates=10)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"\. cannot be moved aside from within"):
        RunFolder(".").move_aside()

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(RunDirectoryError, match=r"run cannot be renamed to run\.old-1: Device or res"):
        RunFolder(tmp_path / "run").move_aside()


def test_a_hang_on_a_full_disk_is_told_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(HangWatch, "_sweep", lambda self: None)
    (tmp_path / f"hang-{os.getpid()}.txt").symlink_to("/dev/full")
    moves, hangs = [0], []

    def notice(seconds, file):
        hangs.append(seconds)

    with HangWatch(tmp_path, after_s=0.1, progress=lambda: moves[0], notice=notice):
        for number in (1, 2):
            deadline = time.monotonic() + 20
            while len(hangs) < number and time.monotonic() < deadline:
                time.sleep(0.01)
            moves[0] += 1
            time.sleep(0.1)
    assert len(hangs) >= 2


def test_one_that_cannot_be_read_does_not_hide_the_other_runs(tmp_path):
    trained(tmp_path / "all/good", updates=10)
    trained(tmp_path / "all/odd", updates=10)
    (tmp_path / "all/odd/events.jsonl").unlink()
    (tmp_path / "all/odd/events.jsonl").mkdir()
    done = surefoot("runs", tmp_path / "all", "--json")
    assert done.returncode == 0, done.stderr
    (shown,) = json.loads(done.stdout)
    assert Path(shown["run"]).name == "good"
    assert "odd: " in done.stderr


TWICE = """
import time
import surefoot.cli.main as cli

def app(prog_name):
    print("up", flush=True)
    time.sleep(60)

cli.app = app
cli.main()
"""


@pytest.mark.parametrize("gap_s", [0.001, 0.005, 0.02])
def test_a_second_ctrl_c_right_after_the_first_changes_nothing(gap_s):
    command = [sys.executable, "-c", TWICE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(gap_s)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (75, "interrupted; run the same command to go on\n")


def test_a_run_that_goes_on_while_it_is_verified_is_looked_at_again(tmp_path, monkeypatch):
    """What was not there yet when it was not going on is no damage."""
    trained(tmp_path / "run", updates=10)
    goes_on = iter([False, True, True])
    monkeypatch.setattr(RunFolder, "is_running", lambda self: next(goes_on))

    def check(*_, live, **__):
        return [] if live else [("tail.bin", "damaged header or wrong size", 0)]

    monkeypatch.setattr("surefoot.run.check_log", check)
    assert sf.open_run(tmp_path / "run").verify() == []
    goes_on = iter([False, False])
    assert [f.file for f in sf.open_run(tmp_path / "run").verify()] == ["steps/tail.bin"]
