"""Checkpoints: whole or not at all, and no altered byte is ever used."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import deque
from unittest.mock import patch

import pytest
import torch
from conftest import blobs, recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surefoot as sf
from surefoot.checkpoint.files import to_json
from surefoot.checkpoint.kept import Checkpoint, list_checkpoints
from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.snapshot import Snapshot, is_finite
from surefoot.checkpoint.store import DirectoryStore
from surefoot.checkpoint.tensors import flatten, unflatten
from surefoot.course import Label, Silence, run_validation, settle, update, validation_due
from surefoot.errors import StateError
from surefoot.prepare import prepare


def snapshot(value=1.0):
    model = {
        "w": torch.full((3, 4), value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "empty": torch.empty(0, 7),
        "count": torch.tensor(3),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "flag": torch.tensor([True, False]),
    }
    return Snapshot(model, {"w/momentum": torch.ones(3, 4)}, {"step": 7, "x": [1, 2.5, None, "a"]})


def assert_same(a, b):
    for one, other in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)
    assert a.facts == b.facts


def test_what_lies_under_a_temporary_name_hinders_no_checkpoint(tmp_path):
    """A file, a link, or what cannot be removed (an open file on NFS); all but the last are swept."""
    store = DirectoryStore(tmp_path / "c")
    store.save(snapshot(5), 5)
    (store.path / ".tmp-000001-000000005.pin").touch()
    (store.path / ".trash-link").symlink_to(tmp_path)
    held = store.path / ".trash-000000-000000001"
    held.mkdir()
    with patch("shutil.rmtree", side_effect=OSError(errno.EBUSY, "Device or resource busy")):
        store.save(snapshot(10), 10)
    assert [c.step for c in store.checkpoints()] == [5, 10]
    assert [p for p in store.path.iterdir() if p.name.startswith(".")] == [held]
    assert tmp_path.is_dir()
    store.save(snapshot(15), 15)
    assert not held.exists()


def test_what_is_kept_comes_back(tmp_path):
    store = DirectoryStore(tmp_path / "c", retention=Retention(last=2))
    for step in (5, 10, 15):
        store.save(snapshot(step), step)
    kept = store.checkpoints()
    assert [(c.seq, c.step) for c in kept] == [(2, 10), (3, 15)]
    assert_same(store.load(kept[-1]), snapshot(15))
    assert sorted(p.name for p in kept[-1].path.iterdir()) == [
        "MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("seed", range(80))
def test_any_altered_byte_is_refused(tmp_path, seed):
    store, rng = DirectoryStore(tmp_path / "c"), random.Random(seed)
    kept = store.save(snapshot(), 5)
    file = rng.choice(sorted(kept.path.iterdir()))
    data = bytearray(file.read_bytes())
    match seed % 4:
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data += b"\0"
        case 3:
            file.unlink()
    if seed % 4 != 3:
        file.write_bytes(data)
    with pytest.raises(StateError, match=kept.path.name):
        store.load(kept)


def test_two_checkpoints_mixed_are_refused(tmp_path):
    store = DirectoryStore(tmp_path / "c")
    one, other = store.save(snapshot(1), 5), store.save(snapshot(2), 6)
    shutil.copy(one.path / "model.safetensors", other.path / "model.safetensors")
    with pytest.raises(StateError):
        store.load(other)
    shutil.rmtree(other.path)
    shutil.copytree(one.path, other.path)
    with pytest.raises(StateError, match="another checkpoint"):
        store.load(list_checkpoints(tmp_path / "c")[-1])


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
@pytest.mark.parametrize("nth", range(1, 8))
def test_an_error_in_any_call_leaves_the_old_one(tmp_path, monkeypatch, call, nth):
    store = DirectoryStore(tmp_path / "c", retention=Retention(last=1))
    store.save(snapshot(1), 5)
    real, count = getattr(os, call), [0]

    def failing(*arguments, **options):
        count[0] += 1
        if count[0] == nth:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    try:
        store.save(snapshot(2), 6)
        failed = False
    except OSError:
        failed = True
    monkeypatch.undo()
    kept = store.checkpoints()
    assert_same(store.load(kept[-1]), snapshot(2 if kept[-1].step == 6 else 1))
    assert failed == (count[0] >= nth)
    store.save(snapshot(3), 7)  # and nothing is in the way of the next
    assert_same(store.load(store.checkpoints()[-1]), snapshot(3))


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, fit):
    """The newest is damaged, the one before is used, the run ends with the same bits."""
    operations = sf.Operations(checkpoint={"every": 3})
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=operations):
        if outcome.step == 10:
            break
    kept = list_checkpoints(tmp_path / "run/checkpoints")
    file = kept[-1].path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    view = sf.open_run(tmp_path / "run")
    assert [f.file for f in view.verify()] == [f"checkpoints/{kept[-1].path.name}/model.safetensors"]
    done = sf.fit(recipe(), out=tmp_path / "run", operations=operations)
    assert done.digest == fit().digest
    rejected = [e for e in view.events(all_events=True) if e["kind"] == "checkpoint_rejected"]
    assert kept[-1].path.name in rejected[0]["reason"]


def test_no_silent_fresh_start(tmp_path):
    path = tmp_path / "run"
    for outcome in sf.steps(recipe(), out=path):
        if outcome.step == 3:
            break
    (kept,) = list_checkpoints(path / "checkpoints")
    manifest = (kept.path / "MANIFEST.json").read_text()
    (kept.path / "MANIFEST.json").write_text(manifest.replace("1", "2", 1))
    with pytest.raises(sf.StateError, match="none is sound"):
        sf.fit(recipe(), out=path)
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(sf.StateError, match="has kept checkpoints"):
        sf.fit(recipe(), out=path)


def test_a_state_that_is_certified_while_retention_looks_at_it_stays(tmp_path):
    store = DirectoryStore(tmp_path, retention=Retention(last=3))
    first = store.save(snapshot(), 10)
    store.protected = first.seq
    for step in (20, 30):
        store.save(snapshot(), step)
    kept = Checkpoint.kept

    def in_the_meantime(checkpoint, **facts):  # the loop's thread
        found = kept(checkpoint, **facts)
        if checkpoint.seq == first.seq and store.protected is not None:
            store.certify(first)
            store.protected = None
        return found

    with patch.object(Checkpoint, "kept", in_the_meantime):
        store.save(snapshot(), 40)
    assert store.protected is None
    assert first.mark("certified").exists()
    store.save(snapshot(), 50)
    assert first in store.checkpoints()


def test_a_newer_format_is_refused_clearly(tmp_path):
    store = DirectoryStore(tmp_path / "c")
    kept = store.save(snapshot(), 5)
    manifest = {**json.loads((kept.path / "MANIFEST.json").read_text()), "schema": 99}
    del manifest["self"]
    manifest["self"] = hashlib.sha256(to_json(manifest)).hexdigest()
    (kept.path / "MANIFEST.json").write_bytes(to_json(manifest))
    with pytest.raises(StateError, match="has format 99; this version reads 2"):
        store.load(kept)


class Tied(nn.Module):
    """Tied weights, a float64 buffer, a frozen part, extra state."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.out, self.calls = nn.Linear(8, 3), 0

    def forward(self, x):
        self.calls += 1
        self.seen += x.double().mean().detach()
        return self.out(self.head(self.frozen(torch.tanh(self.embed(x)))))

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize(
    "optimizer",
    [
        sf.SGD(lr=0.1, momentum=0.9, nesterov=True),
        sf.Adam(amsgrad=True),
        sf.AdamW(fused=True),
        sf.NAdamW(),
        sf.RMSprop(momentum=0.5, centered=True),
        sf.Adagrad(),
        sf.Adadelta(),
        sf.Adafactor(),
        lambda groups: torch.optim.ASGD(groups, lr=0.05),
        lambda groups: torch.optim.Rprop(groups),
    ],
    ids=lambda o: type(o).__name__,
)
def test_every_optimizer_continues_to_the_bit(tmp_path, optimizer):
    changed = recipe(model=Tied, optimizer=optimizer, until=20)
    whole = sf.fit(changed, out=tmp_path / "whole")
    for stop in (3, 4, 11):
        for outcome in sf.steps(changed, out=tmp_path / "parts"):
            if outcome.step == stop:
                break
    parts = sf.fit(changed, out=tmp_path / "parts")
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert parts.model.calls == whole.model.calls
    assert sf.digest(parts.model) == parts.digest


def test_nests_survive_and_foreign_things_are_refused():
    tensors = {}
    tree = {"a": [1, 2.5, None, {"b": torch.ones(2)}], "c": "x", "d": (True, torch.zeros(1))}
    flat = json.loads(json.dumps(flatten(tree, "root", tensors)))
    back = unflatten(flat, tensors)
    assert torch.equal(back["a"][3]["b"], torch.ones(2))
    assert back["a"][:3] == [1, 2.5, None]
    assert torch.equal(back["d"][1], torch.zeros(1))
    with pytest.raises(StateError, match="nothing is pickled"):
        flatten({"a": object()}, "root", {})


def test_the_writers_thread_starts_no_pool_of_torch(tmp_path):
    """With more threads than cores those of the training thread would no longer spin, and all its steps
    take a tenth longer from the first checkpoint on.
    """
    script = """if True:
        import os, sys, time, torch
        from pathlib import Path
        from surefoot.checkpoint.snapshot import Snapshot, is_finite
        from surefoot.checkpoint.store import DirectoryStore
        from surefoot.checkpoint.writer import Writer
        torch.set_num_threads(2)
        tensor = torch.ones(1 << 20)
        tensor.add_(1)  # this thread has its pool from here on
        half = {"h": tensor.bfloat16(), "c": tensor.to(torch.complex64), "w": tensor}
        snapshot = Snapshot(half, {"m": tensor.half()}, {}, finite=frozenset(half))
        count = lambda: len(os.listdir("/proc/self/task"))
        before = count()
        writer = Writer(DirectoryStore(Path(sys.argv[1])))
        writer.reserve(snapshot)
        writer.submit(snapshot, 1)
        assert writer.drain(60) and writer.written[0].checkpoint is not None
        deadline = time.monotonic() + 10
        while count() - before > 1 and time.monotonic() < deadline:  # a pool would stay
            time.sleep(0.01)
        print(count() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "1", done.stdout  # the writer itself


@given(
    st.sampled_from(["float64", "float32", "float16", "bfloat16", "complex64", "float8_e5m2", "int32"]),
    st.lists(st.sampled_from([0.0, -1.5, 3e4, math.inf, -math.inf, math.nan]), min_size=0, max_size=40),
    st.booleans(),
)
def test_what_is_not_finite_is_found_in_every_dtype(dtype, numbers, strided):
    kind = getattr(torch, dtype)
    numbers = [x for x in numbers if math.isfinite(x)] if kind == torch.int32 else numbers
    tensor = torch.tensor(numbers, dtype=torch.float64).to(kind)
    tensor = torch.stack((tensor, tensor))[0] if strided else tensor
    expected = all(math.isfinite(x) for x in numbers)
    if kind == torch.float8_e5m2:  # 3e4 is in range: its largest number is 57,344
        expected = bool(torch.isfinite(tensor.float()).all())
    assert is_finite(Snapshot({"w": tensor}, {}, {}, finite=frozenset({"w"}))) == expected
    assert is_finite(Snapshot({"mask": tensor}, {}, {}))


def test_a_snapshot_shares_nothing_with_the_run_that_goes_on():
    """It is written in the background, and gone back to."""
    changes = {"until": 200, "validation": sf.Validation(sf.Arrays(*blobs(64)), every=20)}
    made = prepare(recipe(**changes), sf.Operations(compute={"compile": "off"}))
    feed = made.feed(lambda kind, **facts: None)
    course = made.course(feed, None, Silence(), deque(maxlen=1))
    kept = []
    for batch in feed.batches(0, 200):
        label = Label(batch.slots, course.state.samples, 0.1, 1, 0.0, 0.0, 0.0)
        settle(course, label, update(course, batch)[2].numbers())
        if validation_due(course):
            run_validation(course)
        if course.state.step % 15 == 0:
            facts = course.state.snapshot().facts
            kept.append((facts, json.dumps(facts)))
    assert [json.dumps(facts) for facts, _ in kept] == [then for _, then in kept]
    assert len({then for _, then in kept}) == len(kept) == 13
