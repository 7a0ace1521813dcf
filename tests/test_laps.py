"""Compiled steps taken in laps, by a thread that never needs Python's lock, are the steps they would be."""

import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, recipe
from test_graph import EVENTFUL, calmly, diverging, run
from test_kill import Forked, kill_in_time, newest_step

import surefoot as sf
from surefoot import calm, compiled, laps
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.guard import judge
from surefoot.guard.watch import Watch
from surefoot.measure.digest import digest
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder

LONG = ROOT / "tests/recipes/long.py"
COMPILED = Operations(compute={"compile": "on"}, progress="off")


@pytest.fixture(autouse=True)
def by_calls_that_are_compiled(monkeypatch):
    """The guard takes up what is usual some steps later."""
    monkeypatch.setattr(judge, "YOUNG", 0)


@pytest.fixture
def num_laps(monkeypatch):
    begin, num = laps.Laps.begin, [0]

    def counting(self, *of):
        num[0] += 1
        return begin(self, *of)

    monkeypatch.setattr(laps.Laps, "begin", counting)
    return num


SAME = [name for name in EVENTFUL if name not in ("dropout", "several passes", "fp16", "vanishing")]


@pytest.mark.parametrize("name", [*SAME, "vanishing"])
def test_steps_in_laps_are_those_that_would_be_taken_one_by_one(name, tmp_path, monkeypatch, num_laps):
    changed = diverging() if name == "healed" else recipe(**EVENTFUL[name])
    in_laps = calmly(changed, tmp_path / "laps", monkeypatch, calm=True, checkpoint={"every": 61})
    num, num_laps[0] = num_laps[0], 0
    assert num > 10
    alone = calmly(changed, tmp_path / "alone", monkeypatch, calm=False, checkpoint={"every": 61})
    assert num_laps == [0]
    for a, b in zip(in_laps, alone, strict=True):
        np.testing.assert_equal(a, b)  # NaN is NaN


@pytest.mark.parametrize("how", ["one core", "no more threads", "no laps"])
def test_laps_are_alike_whoever_takes_them(how, tmp_path, monkeypatch, num_laps):
    meanwhile = calmly(diverging(), tmp_path / "meanwhile", monkeypatch, calm=True)
    assert num_laps[0] > 10
    if how == "one core":
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    elif how == "no more threads":  # what a system says that has no memory for another stack
        monkeypatch.setattr(
            laps,
            "_loop",
            lambda: SOURCE.replace("thread = std::thread(", "throw std::exception(); (void)("),
        )
    else:
        monkeypatch.setattr(compiled.Compiled, "laps", lambda self, written: None)
    otherwise = calmly(diverging(), tmp_path / "otherwise", monkeypatch, calm=True)
    np.testing.assert_equal(meanwhile, otherwise)


SOURCE = Path(laps.__file__).with_name("laps.cpp").read_text()


def test_laps_round_as_the_callers_thread_does(tmp_path):
    """Numbers too small for a normal float; also where that is changed once there is a thread."""

    def tiny(model, data):
        x, y = data
        return 1e-39 * (model(x)[:, 0] * y.float()).square()

    changed = recipe(objective=tiny, optimizer=sf.SGD(lr=0.1, momentum=0.5), gradient=(), until=400)
    _, built = run(changed, tmp_path / "run", COMPILED)
    _, direct = built.run.graph.direct(100)
    batches = [built.run.feed.at(0)]
    losses = []
    try:
        for flushed in (False, True, False):
            torch.set_flush_denormal(flushed)
            _, wait = direct.begin(batches, [0.0], (math.inf,) * 3, math.inf)
            losses.append(wait().rows[0][0])
            assert "surefoot-steps" in names_of_threads()
    finally:
        torch.set_flush_denormal(False)
    assert 0 < losses[0] < 1e-37
    assert losses == [losses[0], 0.0, losses[0]]


def test_an_error_of_a_kernel_ends_the_run_at_its_step(tmp_path, num_laps):
    """Labels that are no classes."""
    x, y = blobs(6400, classes=3)
    y[-1] = 3
    changed = recipe(data=sf.Arrays(x, y), batch=sf.Batch(32, shuffle=False), until=400)
    with pytest.raises(RuntimeError, match=r"(?i)index|target"):
        run(changed, tmp_path / "run", COMPILED)
    assert num_laps[0] > 3
    log = sf.open_run(tmp_path / "run").log()
    assert log["step"].tolist() == list(range(199))
    (ended,) = (e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "ended")
    assert (ended["status"], ended["step"]) == ("failed", 199)


def names_of_threads():
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return found


def test_a_thread_that_has_nothing_to_do_ends(tmp_path, monkeypatch):
    seen, settle = [], calm.settle_calm

    def looking(*of, **times):
        seen.extend(name for name in names_of_threads() if name == "surefoot-steps")
        return settle(*of, **times)

    monkeypatch.setattr(calm, "settle_calm", looking)
    done, built = run(recipe(until=400), tmp_path / "run", COMPILED)
    assert done.status == "finished"
    assert seen
    deadline = time.monotonic() + 60
    while "surefoot-steps" in names_of_threads():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _, direct = built.run.graph.direct(100)  # and is begun again
    batches = [built.run.feed.at(step) for step in range(5)]
    begun = [direct.begin(batches, [0.0] * 5, (math.inf,) * 3, math.inf) for _ in range(2)]
    assert [(num, len(wait().rows)) for num, wait in begun] == [(5, 5), (5, 5)]


def test_laps_are_taken_where_they_are_begun_once_the_process_ends(tmp_path):
    _, built = run(recipe(until=400), tmp_path / "run", COMPILED)
    _, direct = built.run.graph.direct(100)
    batches = [built.run.feed.at(step) for step in range(5)]
    laps._end_all()
    begun = [direct.begin(batches, [0.0] * 5, (math.inf,) * 3, math.inf) for _ in range(2)]
    assert "surefoot-steps" not in names_of_threads()
    assert [(num, len(wait().rows)) for num, wait in begun] == [(5, 5), (5, 5)]


def test_signals_are_pythons_but_for_those_of_a_crash(tmp_path, monkeypatch):
    blocked, settle = [], calm.settle_calm

    def looking(*of, **times):
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().strip() == "surefoot-steps":
                (line,) = (t for t in (task / "status").read_text().splitlines() if t.startswith("SigBlk"))
                blocked.append(int(line.split()[1], 16))
        return settle(*of, **times)

    monkeypatch.setattr(calm, "settle_calm", looking)
    run(recipe(until=200), tmp_path / "run", COMPILED)
    found = {number for number in signal.Signals if blocked[-1] >> (number - 1) & 1}
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD} <= found
    assert not {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT} & found


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize("where", ["wait", "take up", "settle", "begin"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_has_rows_without_a_gap_and_goes_on(tmp_path, monkeypatch, where, error, at):
    """Wherever it is interrupted: what is under way ends, and only what was counted whole is told of."""
    whole, _ = run(recipe(until=500), tmp_path / "whole", COMPILED)
    owner, name = {
        "wait": (laps.Laps, "wait"),
        "take up": (Watch, "take_calm"),
        "settle": (calm, "settle_calm"),
        "begin": (calm, "multipliers"),
    }[where]
    kept = {"compute": {"compile": "on"}, "progress": "off", "checkpoint": {"every": 40}}
    with monkeypatch.context() as patch:
        function, calls = getattr(owner, name), [at]

        def failing(*of, **named):
            result = function(*of, **named)
            calls[0] -= 1
            if calls[0] == 0:
                raise error
            return result

        built = build(recipe(until=500), RunFolder(tmp_path / "parts"), Operations(**kept))
        patch.setattr(owner, name, failing)
        with pytest.raises(error):
            for _ in run_steps(built):
                pass
    assert all(lap.done for lap in built.run.graph._whole._laps._begun)
    view = sf.open_run(tmp_path / "parts")
    steps = view.log()["step"].tolist()
    assert steps == list(range(len(steps)))
    (ended,) = (e for e in view.events() if e["kind"] == "ended")
    assert ended["status"] == ("preempted" if error is KeyboardInterrupt else "failed")
    if error is OSError:  # each step that was taken is told of
        limited = Operations(compute={"compile": "on"}, progress="off", budget={"updates": len(steps)})
        some, _ = run(recipe(until=500), tmp_path / "some", limited)
        assert digest(built.run.parts.model.state_dict()) == some.digest
    parts, _ = run(recipe(until=500), tmp_path / "parts", Operations(**kept))
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert view.log()["step"].tolist() == list(range(500))


LEFT = """
import math, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import recipe
from test_graph import run
from surefoot.measure.digest import digest
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder

_, built = run(recipe(until=400), Path({out!r}), Operations(compute={{"compile": "on"}}, progress="off"))
_, direct = built.run.graph.direct(100)
batches = [built.run.feed.at(step % 4) for step in range(5000)]
for _ in range(3):
    assert direct.begin(batches, [0.0] * 5000, (math.inf,) * 3, math.inf)[0] == 5000
child = os.fork()
if child == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("left")
"""


def test_a_process_and_its_fork_can_end_while_laps_are_under_way(tmp_path):
    script = LEFT.format(tests=str(ROOT / "tests"), out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "left"), done.stderr


OTHERS_NUMBER = """
import os, sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import blobs, recipe
from torch import nn
import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder

def num_threads():
    return len(os.listdir("/proc/self/task"))

assert torch.get_num_threads() == 1  # conftest's; from now on it is this thread's
other = threading.Thread(target=torch.set_num_threads, args=(2,))
other.start(), other.join()
model = lambda: nn.Sequential(
    nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)
)
wide = recipe(model=model, data=sf.Arrays(*blobs(n=2048, features=256)), batch=sf.Batch(256), until=200)
built = build(wide, RunFolder(Path({out!r})), Operations(compute={{"compile": "on"}}, progress="off"))
before, most = num_threads(), 0
for _ in run_steps(built):
    most = max(most, num_threads())
print(most - before)
"""


def test_kernels_in_laps_have_the_runs_number_of_threads_whatever_another_thread_has(tmp_path):
    """MKL's, too: it begins no threads of its own."""
    script = OTHERS_NUMBER.format(tests=str(ROOT / "tests"), out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 3  # that of laps, and of checkpoints


@pytest.mark.parametrize(
    "code",
    [
        "nothing that is known",
        "void inductor_entry_impl(\n) { }",
        "void inductor_entry_impl(\n) { py::gil_scoped_release_simple release; PyObject_Call(); }",
        "void inductor_entry_impl(\n) { py::gil_scoped_release_simple release; py::gil_scoped_acquire a; }",
        2 * "void inductor_entry_impl(\n) { py::gil_scoped_release_simple release; }",
    ],
)
def test_what_is_not_as_expected_stays_as_it_is(code):
    assert laps._with_loop(code) == code


def test_a_run_in_laps_that_is_killed_and_stopped_ends_with_the_bits_of_one_that_is_not(tmp_path):
    def start(name):
        out = tmp_path / name
        return Forked(
            "train", LONG, "--out", out, "--threads", 1, "--set", "compute.compile=on",
            "--set", "checkpoint.every=700", log=tmp_path / f"{name}.log",
        )  # fmt: skip

    whole = start("whole")
    told = whole.communicate()[0]
    assert whole.returncode == 0, told
    rng, ends = random.Random(0), []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        process = start("parts")
        try:
            if number is not None:
                kill_in_time(process, tmp_path / "parts", rng, reach=3000, number=number)
            told = process.communicate()[0]
        finally:
            process.kill()
        ends.append(process.returncode)
    assert ends == [-signal.SIGKILL, 75, -signal.SIGKILL, 75, -signal.SIGKILL, 0], told
    one, other = (sf.open_run(tmp_path / name) for name in ("whole", "parts"))
    assert one.verify() == other.verify() == []
    for fact in ("digest", "ledger"):
        assert one.summary()[fact] == other.summary()[fact]
    columns = one.log(), other.log()
    timed = ("attempt", "data_wait_s", "step_s", "wall_s", "cost", "time_s")
    for name in set(columns[0]) - set(timed):
        np.testing.assert_array_equal(*(log[name] for log in columns), err_msg=name)
    assert newest_step(tmp_path / "parts") == len(columns[0]["step"])


class Decomposed(torch.nn.Module):
    """With operations for which torch's C++ takes a way of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        weight = self.first.weight
        return self.last(self.first(x) @ torch.linalg.cholesky(weight @ weight.T + torch.eye(4)))


def test_torch_does_not_tell_how_it_calls_an_operation(tmp_path):
    told, log = [], logging.getLogger("torch._inductor.ir")
    handler = logging.Handler()
    handler.emit = told.append
    log.addHandler(handler)
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            _, built = run(recipe(model=Decomposed), tmp_path / "run", COMPILED)
    finally:
        log.removeHandler(handler)
    assert built.run.graph is not None
    assert not told
    assert not log.filters
