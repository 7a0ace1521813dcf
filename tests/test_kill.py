"""A run that is killed, however often, ends with the bits of one that is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT, recipe, surefoot, surefoot_process

import surefoot as sf
from surefoot.cli.main import main
from surefoot.data import workers
from surefoot.record.rows import read_newest

EVERYTHING = ROOT / "tests/recipes/everything.py"
EPOCHS = 5


def shown(path: Path) -> dict:
    done = surefoot("show", path, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def newest_step(path: Path) -> int:
    try:
        steps = read_newest(path / "steps", 1)["step"]
    except OSError:
        return 0
    return int(steps[-1]) + 1 if len(steps) else 0


def train(path: Path, *settings: str, workers: int = 2, every: str = "3", fresh: bool = False):
    return surefoot_process(
        "train", EVERYTHING, f"epochs={EPOCHS}", *settings, "--out", path,
        "--set", f"data.workers={workers}", "--set", f"checkpoint.every={every}",
        fresh=fresh,
    )  # fmt: skip


class Forked:
    """The command line in a process that is forked from this one, in which torch is imported already: it is
    up in a tenth of a second, and dies of a signal as any other.
    """

    def __init__(self, *arguments: object, log: Path) -> None:
        self._log = log
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=([str(a) for a in arguments],)
        )
        self._process.start()

    def _run(self, arguments: list[str]) -> None:
        with self._log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["surefoot", *arguments]
        main()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> tuple[str, str]:
        self._process.join()
        return self._log.read_text(), ""

    @property
    def returncode(self) -> int:
        return self._process.exitcode


def train_fresh(path: Path, *settings: str):
    """As by a shell."""
    return train(path, *settings, fresh=True)


def train_forked(path: Path, *settings: str) -> Forked:
    return Forked(
        "train", EVERYTHING, f"epochs={EPOCHS}", *settings, "--out", path, "--threads", 1,
        "--set", "data.workers=2", "--set", "checkpoint.every=3", log=path.with_suffix(".log"),
    )  # fmt: skip


def kill_until_done(
    path: Path, rng: random.Random, *settings: str, reach: int = 5, start: Callable[..., Any] | None = None
) -> int:
    """Starts the same command again and again, and kills it; how often."""
    kills, deadline = 0, time.monotonic() + 280
    while True:
        process = (start or train)(path, "pause_s=0.004", *settings)
        try:
            kill_in_time(process, path, rng, reach)
        finally:
            process.kill()
        out, err = process.communicate()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, err + out
        kills += 1
        assert time.monotonic() < deadline


def kill_in_time(process, path: Path, rng: random.Random, reach: int, number: int = signal.SIGKILL) -> None:
    """Kills a training process some steps from where it starts, or anywhere."""
    begun, first = time.monotonic(), newest_step(path)
    if rng.random() < 0.15:  # importing and restoring included
        time.sleep(rng.uniform(0.0, 0.5 if isinstance(process, Forked) else 3.5))
    else:
        goal = first + rng.randint(1, reach)
        while newest_step(path) < goal and process.poll() is None:
            time.sleep(0.002)
            assert time.monotonic() < begun + 60
        time.sleep(rng.uniform(0.0, 0.03))
    process.send_signal(number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Digest and ledger of runs that nothing disturbed, read without workers."""
    known: dict[tuple[str, ...], dict] = {}

    def get(*settings: str) -> dict:
        if settings not in known:
            path = tmp_path_factory.mktemp("whole") / "run"
            process = train(path, "pause_s=0.001", *settings, workers=0, every="1000")
            _, err = process.communicate()
            assert process.returncode == 0, err
            known[settings] = shown(path)
        return known[settings]

    return get


def assert_equal_runs(path: Path, whole: dict) -> None:
    told = shown(path)
    for name in ("status", "step", "samples", "epoch", "metrics", "digest", "ledger"):
        assert told[name] == whole[name], name
    log = sf.open_run(path).log()
    assert log["step"].tolist() == list(range(whole["step"]))
    checked = surefoot("verify", path)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("seed", "settings"),
    [(0, ()), (1, ("optimizer=adamw",)), (2, ("tail=straddle",)), (3, ("precision=fp16",))],
)
def test_killed_at_random_instants(tmp_path, uninterrupted, seed, settings):
    """The first started as by a shell, the others forked: their kills fall within a run's own code."""
    start = train_fresh if seed == 0 else train_forked
    kills = kill_until_done(tmp_path / "run", random.Random(seed), *settings, start=start)
    assert kills >= 8
    assert_equal_runs(tmp_path / "run", uninterrupted(*settings))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("half", [0, 1])
def test_killed_a_thousand_times(tmp_path, uninterrupted, half):
    """Most processes are forked, which spares the imports; one run in ten is started as by a shell."""
    kills = runs = 0
    while kills < 500:
        settings = [(), ("optimizer=adamw",), ("tail=pad",), ("precision=bf16",)][runs % 4]
        path, rng = tmp_path / f"run{runs}", random.Random(1000 * half + runs)
        start = train_fresh if runs % 10 == 0 else train_forked
        kills += kill_until_done(path, rng, *settings, reach=2, start=start)
        assert_equal_runs(path, uninterrupted(*settings))
        runs += 1
    print(f"{kills} kills of {runs} runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_keeps_the_state_and_exits_75(tmp_path, uninterrupted, number):
    path = tmp_path / "run"
    process = train(path, "pause_s=0.004", every="1h")
    while newest_step(path) < 20:
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command to continue" in out
    stopped = shown(path)
    assert stopped["status"] == "preempted"
    assert stopped["checkpoint_step"] == stopped["step"] == newest_step(path) >= 20
    process = train(path, "pause_s=0.004")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"continues at step {stopped['step']}" in err
    assert_equal_runs(path, uninterrupted())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("pause_s", [0.002, 0.05])
def test_signals_that_come_until_it_has_ended_change_nothing_of_the_exit_code(tmp_path, number, pause_s):
    """A scheduler asks again, a person presses Ctrl-C again: while the state is kept, while the interpreter
    ends.
    """
    arguments = ("train", EVERYTHING, "epochs=500", "--out", tmp_path / "run")
    process = surefoot_process(*arguments, "--set", "data.workers=0", fresh=True)
    try:
        while newest_step(tmp_path / "run") < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            time.sleep(pause_s)
            process.send_signal(number)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert "ignored" not in err
    if number == signal.SIGTERM:  # the other, again and again, cuts short what notes the end, too
        assert sf.open_run(tmp_path / "run").summary()["status"] == "preempted"
    assert sf.open_run(tmp_path / "run").verify() == []


def test_leaving_the_loop_keeps_the_state(tmp_path, fit):
    for outcome in sf.steps(recipe(), out=tmp_path / "left"):
        if outcome.step == 5:
            break
    view = sf.open_run(tmp_path / "left")
    assert (view.status, view.checkpoints()[-1].step) == ("preempted", 6)
    continued = sf.fit(recipe(), out=tmp_path / "left")
    assert (continued.digest, continued.ledger) == (fit().digest, fit().ledger)


def test_an_error_in_the_loop_leaves_the_last_checkpoint(tmp_path, fit):
    def body():
        for outcome in sf.steps(
            recipe(),
            out=tmp_path / "broken",
            operations=sf.Operations(checkpoint={"every": 4}),
        ):
            if outcome.step == 6:
                raise KeyError("mine")

    with pytest.raises(KeyError):
        body()
    assert sf.open_run(tmp_path / "broken").checkpoints()[-1].step in (4, 7)
    continued = sf.fit(recipe(), out=tmp_path / "broken")
    assert continued.digest == fit().digest


def test_a_finished_run_says_so_and_a_changed_recipe_is_refused(tmp_path):
    path = tmp_path / "run"
    assert train(path, workers=0).wait(60) == 0
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    again = train(path, workers=0)
    out, _ = again.communicate()
    assert again.returncode == 0
    assert "has ended already: finished after 60 updates" in out
    changed = train(path, "lr=0.06", workers=0)
    _, err = changed.communicate()
    assert changed.returncode == 2
    assert "lr: 0.05 -> 0.06" in err
    assert "--out" in err
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "LOCK"} == {
        p: b for p, b in before.items() if p.name != "LOCK"
    }


def test_fresh_moves_the_old_run_aside(tmp_path):
    path = tmp_path / "run"
    assert train(path, workers=0).wait(60) == 0
    digest = shown(path)["digest"]
    process = surefoot("train", EVERYTHING, "epochs=1", "--out", path, "--fresh")
    assert process.returncode == 0, process.stderr
    assert shown(path)["step"] == 12
    assert shown(tmp_path / "run.old-1")["digest"] == digest
    refused = surefoot("train", EVERYTHING, "--fresh", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--fresh needs --out" in refused.stderr


def test_two_processes_cannot_have_one_run(tmp_path):
    path = tmp_path / "run"
    first = train(path, "pause_s=0.01", workers=0)
    while newest_step(path) < 2:
        time.sleep(0.01)
    second = train(path, "pause_s=0.01", workers=0)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in err
    assert shown(path)["status"] == "running"
    first.kill()
    first.communicate()
    assert shown(path)["status"] == "failed"


def orphaned(getppid):
    with mock.patch("os.getppid", getppid):
        workers.enter(0)
    os._exit(7)


@pytest.mark.parametrize(("getppid", "code"), [(os.getppid, 7), (lambda: 1, 1)])
def test_a_worker_whose_parent_was_killed_before_it_could_ask_to_die_with_it_ends(getppid, code):
    process = multiprocessing.get_context("fork").Process(target=orphaned, args=(getppid,))
    process.start()
    process.join(60)
    assert process.exitcode == code
