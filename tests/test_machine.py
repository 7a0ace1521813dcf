"""A run on a machine that fails: full, slow and lost disks, dead workers, hangs, stopped processes."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, blobs, recipe, surefoot, surefoot_process
from torch.utils.data import DataLoader

import surefoot as sf
from surefoot.checkpoint.kept import Checkpoint, list_checkpoints
from surefoot.checkpoint.store import DirectoryStore
from surefoot.checkpoint.writer import Writer
from surefoot.cli.recipe_file import RecipeFile
from surefoot.data.workers import Watch, end, next_of, started
from surefoot.keep import Auto
from surefoot.record.rows import read_newest

OFTEN = {"checkpoint": {"every": 2}}


def kinds(path: Path) -> list[str]:
    return [e["kind"] for e in sf.open_run(path).events(all_events=True)]


def wait_for_steps(path: Path, count: int, process) -> None:
    while not (path / "steps/tail.bin").exists() or len(read_newest(path / "steps", 4000)["step"]) < count:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()


# ------------------------------------------------------------------------- disk


def test_a_full_disk_is_outlived(tmp_path, monkeypatch, fit):
    """Training goes on, says so, keeps what it has, and writes again once there is room."""
    real, full = os.write, [False]

    def write(fd, data):
        if full[0]:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    path = tmp_path / "run"
    for outcome in sf.steps(recipe(until=30), out=path, operations=sf.Operations(**OFTEN)):
        full[0] = 6 <= outcome.step < 20
        if outcome.step == 19:
            assert not (path / "BALLAST").exists()  # given up for what follows
            monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 100)  # do not wait
    view = sf.open_run(path)
    assert view.status == "finished"
    assert view.summary()["digest"] == fit(until=30).digest
    assert view.log()["step"].tolist() == list(range(30))
    failed = [e for e in view.events() if e["kind"] == "checkpoint_failed"]
    assert "No space left" in failed[0]["error"]
    assert view.verify() == []


def test_a_disk_that_stays_full_ends_with_an_error_and_the_last_good_state(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    real = DirectoryStore.save

    def save(self, snapshot, step):
        if step > 4:
            raise OSError(30, "Read-only file system")
        return real(self, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", save)
    with pytest.raises(sf.StateError, match="could not be written") as caught:
        sf.fit(recipe(until=9), out=path, operations=sf.Operations(checkpoint={"every": 4}))
    assert "The newest good state is that after step 4" in str(caught.value)
    assert (sf.open_run(path).status, sf.open_run(path).checkpoints()[-1].step) == ("failed", 4)
    monkeypatch.undo()
    assert sf.fit(recipe(until=9), out=path).status == "finished"


def test_a_run_directory_that_vanishes_and_comes_back(tmp_path, monkeypatch, fit):
    """As a mount that is lost for a while."""
    path, away = tmp_path / "run", tmp_path / "away"
    monkeypatch.setattr("surefoot.keep._BACK_OFF_S", (0.01, 0.01))
    for outcome in sf.steps(recipe(until=60), out=path, operations=sf.Operations(**OFTEN)):
        if outcome.step == 10:
            path.rename(away)
        if outcome.step == 30:
            away.rename(path)
        time.sleep(0.005)
    view = sf.open_run(path)
    assert (view.status, view.verify()) == ("finished", [])
    assert "checkpoint_failed" in kinds(path)
    assert view.summary()["digest"] == fit(until=60).digest


def test_a_run_directory_that_is_gone_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.keep._BACK_OFF_S", (0.01, 0.01))
    monkeypatch.setattr("surefoot.keep._TRIES_S", (0.0, 0.01))
    path, reached = tmp_path / "run", 0

    def body():
        nonlocal reached
        for outcome in sf.steps(recipe(until=30), out=path, operations=sf.Operations(**OFTEN)):
            reached = outcome.step
            if outcome.step == 5:
                path.rename(tmp_path / "gone")  # at once, whatever is being written in it
                shutil.rmtree(tmp_path / "gone")

    with pytest.raises(sf.StateError, match="could not be written"):
        body()
    assert reached == 29  # it went on as long as it could
    assert not path.exists()


def test_a_slow_disk_does_not_hold_training_up(tmp_path, monkeypatch):
    real = DirectoryStore.save

    saving, gone_on, went_on = threading.Event(), threading.Event(), []

    def save(self, snapshot, step):
        saving.set()
        went_on.append(gone_on.wait(60))
        return real(self, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", save)
    operations, begun = sf.Operations(checkpoint={"every": "0.05s"}), None
    for outcome in sf.steps(recipe(until=400), out=tmp_path / "run", operations=operations):
        if saving.is_set() and begun is None:
            begun = outcome.step
        if begun is not None and outcome.step == begun + 100:  # a disk that takes as long as these
            gone_on.set()
        time.sleep(0.002)
    assert went_on
    assert all(went_on)
    assert sf.open_run(tmp_path / "run").verify() == []


def test_what_is_saved_is_the_state_at_the_save(tmp_path, monkeypatch):
    """Updates go on while a checkpoint waits to be written; none of them may show in it."""
    real = DirectoryStore.save
    digests = {}

    def save(self, snapshot, step):
        time.sleep(0.05)
        return real(self, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", save)
    operations = sf.Operations(checkpoint={"every": 5, "keep_last": 20})
    for outcome in sf.steps(recipe(until=40), out=tmp_path / "run", operations=operations):
        digests[outcome.step + 1] = sf.digest(outcome.model)
    kept = sf.open_run(tmp_path / "run").checkpoints()
    assert [c.step for c in kept] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert all(c.facts()["digest"] == digests[c.step] for c in kept)


def test_frozen_layers_are_written_once(tmp_path):
    def model():
        big = torch.nn.Linear(8, 200_000).requires_grad_(False)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), big, torch.nn.AdaptiveAvgPool1d(3))

    done = sf.fit(
        recipe(model=model, until=15, batch=sf.Batch(4)),
        out=tmp_path / "run",
        operations=sf.Operations(checkpoint={"every": 3, "keep_last": 9}),
    )
    files = [c.path / "frozen.safetensors" for c in sf.open_run(done.run_dir).checkpoints()]
    assert len(files) == 5
    assert [f.stat().st_ino for f in files[:2]] * 2 == [f.stat().st_ino for f in files[:4]]  # two, in turn
    assert all((f.parent / "model.safetensors").stat().st_size < 2_000 for f in files)
    assert sf.open_run(done.run_dir).verify() == []


def test_a_mask_of_minus_infinity_is_no_poison(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 3)
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
            self.register_buffer("largest", torch.tensor(float("-inf")))

        def forward(self, x):
            self.largest = torch.maximum(self.largest, x.detach().max())
            return self.inner(x)

    for outcome in sf.steps(recipe(model=Masked), out=tmp_path / "run"):
        if outcome.step == 4:
            break
    assert sf.fit(recipe(model=Masked), out=tmp_path / "run").status == "finished"


# ------------------------------------------------------------------------- cadence


def test_a_cadence_by_cost():
    auto = Auto(overhead=0.02, risk_s=600)
    assert auto.interval_s(None) == 2
    assert auto.interval_s(0.01) == 2
    assert auto.interval_s(0.1) == 5
    assert auto.interval_s(1.0) == 50
    assert auto.interval_s(60.0) == 600
    assert Auto(overhead=0.02, risk_s=1).interval_s(1.0) == 1


def test_best_pinned_and_certified_checkpoints_stay(tmp_path):
    x, y = blobs(64, seed=1)
    changed = recipe(until=1000, validation=sf.Validation(sf.Arrays(x, y), every=20))
    kept = {"every": 20, "keep_last": 2, "keep_best": 1}
    pinned: list[Checkpoint] = []
    for _ in sf.steps(changed, out=tmp_path / "run", operations=sf.Operations(checkpoint=kept)):
        if not pinned:
            pinned = list_checkpoints(tmp_path / "run/checkpoints")[:1]
            for checkpoint in pinned:
                checkpoint.mark("pin").touch()
        time.sleep(0.0005)
    view = sf.open_run(tmp_path / "run")
    losses = {e["step"]: e["metrics"]["loss"] for e in view.events() if e["kind"] == "validated"}
    steps = [c.step for c in view.checkpoints()]
    assert {pinned[0].step, 980, 1000, min(losses, key=losses.get)} <= set(steps)
    certified = [c.step for c in view.checkpoints() if c.mark("certified").exists()]
    assert certified
    assert max(certified) <= 650


# ------------------------------------------------------------------------- budgets


def test_budgets_stop_with_a_checkpoint_and_exit_4(tmp_path):
    file, run = ROOT / "tests/recipes/everything.py", tmp_path / "run"
    first = surefoot("train", file, "--out", run, "--set", "budget.updates=10")
    assert first.returncode == 4, first.stderr
    assert "budget.updates = 10 is reached" in first.stdout
    told = json.loads(surefoot("show", run, "--json").stdout)
    assert (told["status"], told["step"], told["checkpoint_step"]) == ("budget", 10, 10)
    again = surefoot("train", file, "--out", run, "--set", "budget.updates=10")
    assert again.returncode == 4
    price = ("--set", "budget.price_per_hour=3600", "--set", "budget.cost=0.0001")
    dear = surefoot("train", file, "--out", run, *price)
    assert dear.returncode == 4
    assert "budget.cost" in dear.stdout
    slow = surefoot("train", file, "pause_s=0.01", "--out", tmp_path / "slow", "--set", "budget.time=1s")
    assert slow.returncode == 4
    done = surefoot("train", file, "--out", run, "--set", "budget.price_per_hour=3600")
    assert done.returncode == 0, done.stderr
    told = json.loads(surefoot("show", run, "--json").stdout)
    log = sf.open_run(run).log(all_rows=True)
    assert told["cost"] == pytest.approx(log["cost"].sum())
    assert told["cost_per_step"] == pytest.approx(told["cost"] / 60)
    assert told["cost_per_epoch"] == pytest.approx(told["cost"] / 5)
    later = log["step"] >= 10
    assert log["cost"][later] == pytest.approx(log["wall_s"][later])
    assert "cost" in surefoot("show", run).stdout
    bad = surefoot("train", file, "--out", tmp_path / "b", "--set", "budget.cost=3")
    assert bad.returncode == 2
    assert "price_per_hour" in bad.stderr


def test_auto_writes_one_state_at_a_time(tmp_path, monkeypatch):
    """However long it takes: a second one would have to be copied into fresh memory."""
    save, submit, asked, most = DirectoryStore.save, Writer.submit, [0], [0]

    def slow(store, snapshot, step):
        time.sleep(3.0)
        asked[0] -= 1
        return save(store, snapshot, step)

    def counted(writer, snapshot, step):
        asked[0] += 1
        most[0] = max(most[0], asked[0])
        submit(writer, snapshot, step)

    monkeypatch.setattr(DirectoryStore, "save", slow)
    monkeypatch.setattr(Writer, "submit", counted)
    monkeypatch.setattr("surefoot.keep._LEAST_AUTO_S", 0.2)
    for outcome in sf.steps(recipe(until=90), out=tmp_path / "run"):
        time.sleep(0.02)
        if outcome.step == 80:
            assert most[0] == 1


# ------------------------------------------------------------------------- processes

WORKERS = """
import os, pathlib, signal, time, torch, torch.nn.functional as F, surefoot as sf
HERE = pathlib.Path(__file__).parent
class Trouble:
    def __len__(self): return 64
    def __getitem__(self, i):
        if i == 40 and (HERE / "armed").exists():
            {trouble}
        return torch.randn(3) + i, i % 2
def recipe() -> sf.Recipe:
    return sf.Recipe(model=lambda: torch.nn.Linear(3, 2), data=sf.Dataset(Trouble()), until="3ep",
        objective=sf.supervised(F.cross_entropy), optimizer=sf.SGD(lr=0.01), batch=sf.Batch(4))
"""

LOCKED = """import gc, multiprocessing.synchronize as mp
            assert [e._cond.acquire() for e in gc.get_objects() if isinstance(e, mp.Event)]
            """
"""Whoever asks whether the workers are to end waits from now on."""
UNARMED = "(HERE / 'armed').unlink(); "


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (UNARMED + "os.kill(os.getpid(), signal.SIGKILL)", "died"),
        (UNARMED + "os.kill(os.getpid(), signal.SIGSTOP)", "hung"),
        (LOCKED + UNARMED + "os.kill(os.getpid(), signal.SIGKILL)", "died"),
        (LOCKED + UNARMED + "os.kill(os.getpid(), signal.SIGSTOP)", "hung"),
    ],
    ids=["died", "hung", "died-with-a-lock", "hung-with-a-lock"],
)
def test_a_dead_or_hung_worker_is_named_and_replaced(tmp_path, trouble, reason):
    (tmp_path / "mine.py").write_text(WORKERS.replace("{trouble}", trouble))
    (tmp_path / "armed").touch()
    settings = ("--workers", "2", "--set", "data.timeout=3s")
    done = surefoot("train", "mine.py", "--out", "run", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (event,) = [e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "worker_replaced"]
    assert event["reason"] == reason
    assert event["workers"]
    calm = surefoot("train", "mine.py", "--out", "calm", cwd=tmp_path)
    assert calm.returncode == 0
    told = [sf.open_run(tmp_path / name).summary() for name in ("run", "calm")]
    assert told[0]["digest"] == told[1]["digest"]
    assert told[0]["ledger"] == told[1]["ledger"]


def test_who_watches_workers_holds_none_of_their_batches():
    """Freed by its thread while the interpreter ends, a tensor aborts the process."""
    loader = DataLoader(torch.ones(40, 2), num_workers=2, prefetch_factor=2)
    workers = started(loader)
    next(workers)
    watch, held = Watch(workers), weakref.ref(workers)
    end(workers)
    del workers
    gc.collect()
    assert held() is None
    watch.close()


def test_a_worker_that_left_with_a_batch_ready_has_died():
    """Its socket is gone, so taking the batch over raises another error than if it had been killed."""

    class Left:
        _workers = (SimpleNamespace(pid=7, exitcode=0),)
        error = FileNotFoundError(2, "No such file or directory")

        def __next__(self):
            raise self.error

    left, watch = Left(), SimpleNamespace(ended=[], deadline=None)
    assert next_of(left, 1.0, watch) == (None, {"reason": "died", "workers": [7]})
    left.error = OSError(24, "Too many open files")  # which no other worker would mend
    with pytest.raises(OSError, match="Too many open files"):
        next_of(left, 1.0, watch)


def test_no_thread_outlives_a_run(fit):
    before = set(threading.enumerate())
    fit(operations=OFTEN)
    assert set(threading.enumerate()) <= before


def test_a_worker_that_stops_with_batches_ready_is_replaced(tmp_path):
    """Its queue holds batches whose memory only it can hand over: taking one would wait without end."""
    (tmp_path / "mine.py").write_text(WORKERS.replace("{trouble}", "pass").replace('"3ep"', '"10ep"'))
    settings = {"data": {"workers": 2, "timeout": "2s"}, "progress": "off"}
    loaded = RecipeFile(tmp_path / "mine.py")
    stopped = False
    for outcome in sf.steps(loaded.make({}), out=tmp_path / "run", operations=sf.Operations(**settings)):
        if outcome.step == 5 and not stopped:
            stopped = True
            time.sleep(0.5)  # until its queue is full
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    view = sf.open_run(tmp_path / "run")
    replaced = [e for e in view.events(all_events=True) if e["kind"] == "worker_replaced"]
    assert [e["reason"] for e in replaced] == ["hung"]
    calm = sf.fit(loaded.make({}), out=tmp_path / "calm")
    assert view.summary()["digest"] == calm.digest
    assert view.summary()["ledger"] == calm.ledger


def test_workers_that_always_die_are_given_up_with_the_step(tmp_path):
    code = WORKERS.replace("{trouble}", "os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "armed").touch()
    done = surefoot("train", "mine.py", "--out", "run", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "the workers died 4 times over step" in done.stderr


def test_a_hang_is_reported_with_every_threads_stack(tmp_path):
    code = WORKERS.replace("{trouble}", "time.sleep(4); (HERE / 'armed').unlink()")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "armed").touch()
    done = surefoot("train", "mine.py", "--out", "run", "--set", "hang_after=1s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hang = [e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "hang"][-1]
    stacks = (tmp_path / "run" / hang["stacks"]).read_text()
    assert 'mine.py"' in stacks
    assert "__getitem__" in stacks
    assert stacks.count("Thread 0x") >= 2


def test_a_hang_before_the_first_step_shows_its_stacks_too(tmp_path):
    code = WORKERS.replace("{trouble}", "pass").replace("model=lambda:", "model=lambda: time.sleep(3) or")
    (tmp_path / "mine.py").write_text(code)
    done = surefoot("train", "mine.py", "--out", "run", "--set", "hang_after=1s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'mine.py", line' in done.stderr
    assert "not through after 1 s" in done.stderr


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        (["steps/rows.bin", "steps/tail.bin"], ("steps/rows.bin", "belongs to another run")),
        (["steps/tail.bin"], ("steps/tail.bin", "rows that rows.bin has otherwise")),
        (["events.jsonl"], ("events.jsonl", "belongs to another run")),
        (["checkpoints"], ("checkpoints/000001-000000016/MANIFEST.json", "belongs to another run")),
    ],
)
def test_files_of_another_run_are_found(tmp_path, fit, files, finding):
    """One of the same recipe, with another seed of nothing but the data's order."""
    run, other = fit().run_dir, fit(seed=1).run_dir
    assert sf.open_run(run).verify() == []
    for file in files:
        if (run / file).is_dir():
            shutil.rmtree(run / file)
            shutil.copytree(other / file, run / file)
        else:
            shutil.copy(other / file, run / file)
    found = {(f.file, f.what.split(",")[0].split(" at byte")[0]) for f in sf.open_run(run).verify()}
    assert finding in found


def test_each_damaged_file_of_a_checkpoint_is_named_with_its_place(tmp_path):
    wide = recipe(model=lambda: torch.nn.Linear(8, 100_000), until=2)
    run = sf.fit(wide, out=tmp_path / "run").run_dir
    folder = sf.open_run(run).checkpoints()[-1].path
    for name, at in (("model.safetensors", 2_500_000), ("state.json", 10)):
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)
    (folder / "mine.txt").touch()
    found = {f.file.split("/")[-1]: (f.offset, f.what) for f in sf.open_run(run).verify()}
    assert {name: offset for name, (offset, _) in found.items()} == {
        "model.safetensors": 2 << 20,
        "state.json": 0,
        "mine.txt": None,
    }
    assert found["model.safetensors"][1] == "altered at or after byte 2097152"


def contents(run: Path) -> dict[Path, bytes]:
    """Of all files but the lock, and what a process notes of itself."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "LOCK" and p.parent.name != "incidents"]
    return {file: file.read_bytes() for file in files}


def test_no_ballast_is_left_in_a_directory_that_was_taken_over(tmp_path, monkeypatch):
    """A process is stopped while it makes the file; when it wakes up the run is another's."""
    run, allocate = tmp_path / "run", os.posix_fallocate
    taken = sf.steps(recipe(until=400), out=run, operations=sf.Operations(**OFTEN))
    next(taken)

    def stopped(fd, at, size):
        allocate(fd, at, size)
        (run / "LOCK.new").touch()
        (run / "LOCK.new").rename(run / "LOCK")

    monkeypatch.setattr(os, "posix_fallocate", stopped)
    (run / "BALLAST").unlink()
    with pytest.raises(sf.RunDirectoryError, match="taken over"):
        for _ in taken:
            pass
    assert not (run / "BALLAST").exists()


def test_a_stopped_process_is_taken_over_and_cannot_write_any_more(tmp_path):
    file, run = ROOT / "tests/recipes/everything.py", tmp_path / "run"
    arguments = ("train", file, "epochs=3", "--out", run, "--set", "checkpoint.every=2")
    zombie = surefoot_process(*arguments, "pause_s=0.02")
    try:
        wait_for_steps(run, 5, zombie)
        zombie.send_signal(signal.SIGSTOP)
        other = surefoot(*arguments, "pause_s=0.02")
        assert other.returncode == 0, other.stderr
        assert f"taken over from process {zombie.pid}" in other.stderr
        whole = contents(run)
        zombie.send_signal(signal.SIGCONT)
        _, err = zombie.communicate(timeout=60)
    finally:
        zombie.kill()
    assert zombie.returncode == 2, err
    assert "was taken over by another process" in err
    assert contents(run) == whole
    assert surefoot("verify", run).returncode == 0
    calm = surefoot("train", file, "epochs=3", "pause_s=0.02", "--out", tmp_path / "calm")
    assert calm.returncode == 0
    digests = {sf.open_run(p).summary()["digest"] for p in (run, tmp_path / "calm")}
    assert len(digests) == 1
