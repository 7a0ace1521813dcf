"""The supervisor: restarts what crashes, tells failures apart, and stops what does not get on."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import surefoot, surefoot_process

import surefoot as sf
from surefoot.launch.supervise import run_directory
from surefoot.record.rows import read_newest

FILE = """
import os, pathlib, signal, time, torch, torch.nn.functional as F, surefoot as sf
HERE = pathlib.Path(__file__).parent
class Trouble:
    def __len__(self): return 64
    def __getitem__(self, i):
        time.sleep(0.002)
        if i == 40 and (HERE / "armed").exists():
            {trouble}
        return torch.arange(3.0) + i, i % 2
def recipe(lr: float = 0.01) -> sf.Recipe:
    return sf.Recipe(model=lambda: torch.nn.Linear(3, 2), data=sf.Dataset(Trouble()), until="2ep",
        objective=sf.supervised(F.cross_entropy), optimizer=sf.SGD(lr=lr), batch=sf.Batch(4, shuffle=False))
"""
ONCE = "(HERE / 'armed').unlink(); "
TRAIN = ("--out", "run", "--set", "checkpoint.every=2")


def supervise(folder: Path, trouble: str, *options: str, train=TRAIN, fresh=False):
    (folder / "mine.py").write_text(FILE.replace("{trouble}", trouble))
    (folder / "armed").touch()
    command = ("supervise", "--pause", "0.05", *options, "--", "train", "mine.py", *train)
    return surefoot(*command, cwd=folder, fresh=fresh)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "(signal): ended by SIGKILL"),
        ("os.abort()", "(signal): ended by SIGABRT"),
        ("raise KeyError('gone')", "(unknown): KeyError: 'gone'"),
        ("raise MemoryError", "(out_of_memory): MemoryError"),
        ("raise OSError(28, 'No space left on device')", "(disk): OSError"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "(signal): something asked it to stop"),
    ],
)
def test_one_crash_is_mended_by_starting_again(tmp_path, trouble, says):
    done = supervise(tmp_path, ONCE + trouble, fresh="SIGKILL" in trouble)  # one as by a shell
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    assert "1 of 5 without progress" in done.stderr
    calm = surefoot("train", "mine.py", "--out", "calm", cwd=tmp_path)
    assert calm.returncode == 0
    digests = {sf.open_run(tmp_path / name).summary()["digest"] for name in ("run", "calm")}
    assert len(digests) == 1
    assert surefoot("verify", tmp_path / "run").returncode == 0


def test_a_crash_loop_is_stopped_with_a_report(tmp_path):
    done = supervise(tmp_path, "raise KeyError('gone')", "--crashes", "3")
    assert done.returncode == 1
    assert "Crash loop: 3 failures in a row without progress" in done.stderr
    (report,) = (tmp_path / "run/incidents").glob("crash-loop-*.md")
    text = report.read_text()
    assert text.count("KeyError: 'gone'") == 3
    assert "Furthest step: 10" in text
    assert (
        len([e for e in sf.open_run(tmp_path / "run").events(all_events=True) if e["kind"] == "ended"]) == 3
    )


def test_what_the_user_did_wrong_is_not_tried_again(tmp_path):
    done = supervise(tmp_path, "pass", train=("speed=3",))
    assert done.returncode == 2
    assert done.stderr.count("has no option 'speed'") == 1
    for arguments in ([], ["--", "show", "runs/a"]):
        wrong = surefoot("supervise", *arguments)
        assert wrong.returncode == 2
        assert "is not a training command" in wrong.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_training_once(tmp_path, number):
    (tmp_path / "mine.py").write_text(FILE.replace("{trouble}", "time.sleep(600)"))
    (tmp_path / "armed").touch()
    process = surefoot_process("supervise", "--", "train", "mine.py", *TRAIN, cwd=tmp_path)
    tail = tmp_path / "run/steps"
    while not (tail / "tail.bin").exists() or len(read_newest(tail, 99)["step"]) < 10:
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    view = sf.open_run(tmp_path / "run")
    assert (view.status, view.checkpoints()[-1].step) == ("preempted", 10)
    assert json.loads(surefoot("show", tmp_path / "run", "--json").stdout)["attempts"] == 1


def test_the_run_directory_of_a_command():
    assert run_directory(["train", "a/mine.py", "lr=1"]) == Path("runs/mine")
    assert run_directory(["train", "mine.py", "--out", "x/y"]) == Path("x/y")
    assert run_directory(["train", "--out=z", "mine.py"]) == Path("z")
