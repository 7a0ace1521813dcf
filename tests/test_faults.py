"""What a machine can do to a run: kills at every call, power cuts, bit flips, second writers.

Each harness also attacks a writer as people write it, which must fail, or the harness proves nothing.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from conftest import ROOT, recipe
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import surefoot as sf
from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import StateError

sys.path.insert(0, str(ROOT / "tests/faults"))
from kill_everywhere import Naive, Stored, snapshot
from lost_writes import Disk


@pytest.fixture(scope="session")
def killer(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("not run: needs gcc")
    library = tmp_path_factory.mktemp("killer") / "killer.so"
    source = ROOT / "tests/faults/killer.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def in_memory():
    """A folder on a tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("not run: needs a tmpfs at /dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="surefoot-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("where", ["tmp_path", "in_memory"])
def test_a_kill_at_every_call_of_a_save(request, killer, where):
    """Before the call, after it, and within each write."""
    folder, found = request.getfixturevalue(where), {}
    for kind in ("store", "naive"):
        (folder / kind).mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, ROOT / "tests/faults/kill_everywhere.py", folder / kind, kind],
            env={**os.environ, "LD_PRELOAD": str(killer)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[kind] = json.loads(done.stdout)
    assert found["store"]["points"] >= 100
    assert found["store"]["bad"] == []
    assert found["naive"]["bad"], "the harness finds nothing wrong with a writer that is wrong"


def power_cuts(base: Path, kind, count: int) -> list[str]:
    """What is wrong after `count` power cuts at random moments of five saves."""
    root = base / kind.__name__
    root.mkdir()
    disk = Disk(root)
    with disk.recording():
        store = kind(root / "checkpoints")
        for step in range(1, 6):
            store.save(snapshot(step), step)
            disk.saved(step)
    rng, bad = random.Random(0), []
    for _ in range(count):
        state = base / "state"
        shutil.rmtree(state, ignore_errors=True)
        promised = disk.after_power_cut(rng, state)
        try:
            found = kind(state / "checkpoints").newest()
        except (StateError, OSError, ValueError, RuntimeError) as error:
            if promised:
                bad.append(f"{promised} was promised: {error}")
            continue
        if found < promised:
            bad.append(f"{promised} was promised, {found} is there")
    return bad


def test_power_cuts_lose_nothing_that_was_promised(in_memory):
    assert power_cuts(in_memory, Stored, 5_000) == []
    assert power_cuts(in_memory, Naive, 100)


# ------------------------------------------------------------------------- damage anywhere in a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with several attempts, checkpoints, a frozen part, and its digest."""
    path = tmp_path_factory.mktemp("finished") / "run"
    done = None
    for stop in (5, 9, 14, 99):
        for outcome in sf.steps(damaged_recipe(), out=path, operations=OFTEN):
            if outcome.step == stop:
                break
        done = sf.fit(damaged_recipe(), out=path, operations=OFTEN) if stop == 99 else None
    assert done is not None
    assert sf.open_run(path).verify() == []
    return path, done.digest


OFTEN = sf.Operations(checkpoint={"every": 4})


def damaged_recipe():
    return recipe(until=24, groups=(sf.Group("0.*", freeze=True),))


def damage(path: Path, rng: random.Random) -> str:
    """Alters one file of a run somewhere; what was done."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in ("LOCK", "BALLAST"))
    file = rng.choice(files)
    name = file.relative_to(path)
    data = bytearray(file.read_bytes())
    match rng.randrange(3):
        case 0:
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            data[at] ^= 1 << bit
            file.write_bytes(data)
            return f"bit {bit} of byte {at} of {name}"
        case 1:
            at = rng.randrange(len(data))
            file.write_bytes(data[:at])
            return f"{name} cut at {at} of {len(data)}"
    others = [p for p in files if p != file and p.exists() and p.read_bytes() != data]
    other = rng.choice(others)
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{name} and {other.relative_to(path)} swapped"


def undetected_or_lost(run: Path, digest: str, base: Path, seeds: range) -> list[str]:
    bad = []
    for seed in seeds:
        path = base / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(run, path)
        what = f"seed {seed}: {damage(path, random.Random(seed))}"
        try:
            if not sf.open_run(path).verify():
                bad.append(f"{what}: not detected")
        except StateError:
            pass
        try:
            if sf.fit(damaged_recipe(), out=path, operations=OFTEN).digest != digest:
                bad.append(f"{what}: another result")
        except Exception as error:
            bad.append(f"{what}: {type(error).__name__}: {error}")
    return bad


def test_damage_anywhere_is_found_and_a_good_state_restored(tmp_path, finished):
    assert undetected_or_lost(*finished, tmp_path, range(100)) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_damage_at_a_thousand_places(tmp_path, finished):
    assert undetected_or_lost(*finished, tmp_path, range(1000, 2000)) == []


# ------------------------------------------------------------------------- the store as a machine


class StoreMachine(RuleBasedStateMachine):
    """Saves, crashes, damage, restores and second writers in any order: the newest sound state that was
    promised is always restored, and at least two sound ones stay.
    """

    damaged = Bundle("damaged")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"sm-{os.getpid()}"
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.sound: dict[int, int] = {}
        self.value = 0

    def store(self, **more):
        return DirectoryStore(self.path / "c", retention=Retention(last=2), run="r", **more)

    def snapshot(self) -> Snapshot:
        numbers = torch.full((5,), float(self.value))
        frozen = {"f": torch.ones(3)}
        return Snapshot({"w": numbers}, {"m": numbers * 2}, {"v": self.value}, frozen=frozen)

    @initialize()
    def begin(self):
        self.writer = self.store()

    def teardown(self):
        shutil.rmtree(self.path, ignore_errors=True)

    @rule()
    def save(self):
        self.value += 1
        kept = self.writer.save(self.snapshot(), self.value)
        self.sound[kept.seq] = self.value
        self._forget_retired()

    def _forget_retired(self):
        there = {c.seq for c in self.writer.checkpoints()}
        self.sound = {seq: value for seq, value in self.sound.items() if seq in there}

    @rule(call=st.sampled_from(["open", "write", "fsync", "mkdir"]), nth=st.integers(1, 12))
    def crash(self, call, nth):
        """The process dies within a save; another one goes on."""
        self.value += 1
        real, count = getattr(os, call), [0]

        class Died(BaseException):
            pass

        def dying(*arguments, **options):
            count[0] += 1
            if count[0] == nth:
                raise Died
            return real(*arguments, **options)

        tree = shutil.rmtree
        setattr(os, call, dying)
        shutil.rmtree = lambda *a, **k: None if count[0] >= nth else tree(*a, **k)  # the dead clean nothing
        before = {c.seq for c in self.writer.checkpoints()}
        try:
            self.writer.save(self.snapshot(), self.value)
        except Died:
            pass
        finally:
            setattr(os, call, real)
            shutil.rmtree = tree
        for new in {c.seq for c in self.writer.checkpoints()} - before:
            self.sound[new] = self.value
        self.writer = self.store()
        self._restore()
        self._forget_retired()

    @precondition(lambda self: len(self.sound) > 1)
    @rule(data=st.data())
    def damage(self, data):
        """A byte changes; one sound state is left alone, as no store can do without any."""
        seq = data.draw(st.sampled_from(sorted(self.sound)))
        (kept,) = [c for c in self.writer.checkpoints() if c.seq == seq]
        file = data.draw(st.sampled_from(sorted(p for p in kept.path.iterdir())))
        content = bytearray(file.read_bytes())
        at = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))  # lengths differ by times
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        shared = {c.seq for c in self.writer.checkpoints() if (c.path / file.name).samefile(file)}
        if not set(self.sound) - shared:
            return
        file.write_bytes(content)
        for seq in shared & set(self.sound):  # frozen parts are links
            del self.sound[seq]
        self.writer = self.store()
        self._restore()

    def _restore(self):
        """As at the start of a process: what is damaged goes into quarantine."""
        for kept in reversed(self.writer.checkpoints()):
            try:
                found = self.writer.load(kept)
            except StateError:
                assert kept.seq not in self.sound
                self.writer.quarantine(kept, self.path / "q")
                continue
            assert found.facts["v"] == self.sound[kept.seq]
            assert torch.equal(found.model["w"], torch.full((5,), float(found.facts["v"])))
            assert torch.equal(found.optimizer["m"], found.model["w"] * 2)
            assert torch.equal(found.frozen["f"], torch.ones(3))
            return
        assert not self.sound

    @rule()
    def second_writer(self):
        """A writer that has lost the run cannot commit."""

        def lost():
            raise sf.RunDirectoryError("taken over")

        zombie = self.store(may_write=lost)
        before = [c.path for c in self.writer.checkpoints()]
        with pytest.raises(sf.RunDirectoryError):
            zombie.save(self.snapshot(), self.value)
        assert [c.path for c in self.writer.checkpoints()] == before

    @invariant()
    def the_newest_sound_state_is_there(self):
        if not hasattr(self, "writer"):
            return
        sound = []
        for kept in self.writer.checkpoints():
            try:
                kept.verify("r")
                sound.append(kept.seq)
            except StateError:
                continue
        assert sorted(self.sound) == sound


quick = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = quick


@pytest.mark.soak
@pytest.mark.timeout(3600)
class TestStoreMachineForLong(StoreMachine.TestCase):
    settings = settings(quick, max_examples=2000)
