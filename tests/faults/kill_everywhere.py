"""Kills a save at each of its calls that change the file system, and looks at what can be restored.

Run by `test_faults` in a process of its own, with ``killer.so`` preloaded::

    kill_everywhere.py FOLDER [store|naive]

Prints JSON: points, bad (descriptions of states that should not have been).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import StateError

torch.set_num_threads(1)


def snapshot(value: int) -> Snapshot:
    numbers = torch.arange(20_000.0) + value
    return Snapshot(
        {"w": numbers, "b": torch.full((7,), float(value))},
        {"w/momentum": numbers * 2},
        {"value": value},
        frozen={"table": torch.arange(5_000.0)},
        finite=frozenset({"w", "b"}),
    )


class Naive:
    """What people write: tensors and facts into fixed names, in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: Snapshot, step: int) -> None:
        if not self.path.is_dir():
            self.path.mkdir()
        w, m = state.model["w"], state.optimizer["w/momentum"]
        facts = json.dumps(state.facts).encode()
        for name, data in (("w", w.numpy().tobytes()), ("m", m.numpy().tobytes()), ("facts.json", facts)):
            fd = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.write(fd, data)
            os.close(fd)

    def newest(self) -> int:
        w = torch.frombuffer(bytearray((self.path / "w").read_bytes()), dtype=torch.float32)
        m = torch.frombuffer(bytearray((self.path / "m").read_bytes()), dtype=torch.float32)
        value = int(json.loads((self.path / "facts.json").read_text())["value"])
        expected = snapshot(value)
        if not torch.equal(w, expected.model["w"]) or not torch.equal(m, expected.optimizer["w/momentum"]):
            raise StateError("mixed or torn")
        return value


class Stored(DirectoryStore):
    """The store, with the check that a restored state is one that was saved, bit for bit."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, retention=Retention(last=2), run="r")

    def newest(self) -> int:
        for checkpoint in reversed(self.checkpoints()):
            found = self.load(checkpoint)  # after a kill, all that is committed is sound
            expected = snapshot(found.facts["value"])
            for part in ("model", "optimizer", "frozen"):
                ours, theirs = getattr(found, part), getattr(expected, part)
                if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
                    raise StateError(f"{part} is mixed")
            return int(found.facts["value"])
        raise StateError("nothing to restore")


def killed_in_save(folder: Path, kind: type[Naive] | type[Stored], n: int, mode: int) -> bool:
    """Saves state 4 in a forked process that dies at call n; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(os.environ["LD_PRELOAD"]).killer_arm(n, mode)
            kind(folder).save(snapshot(4), 4)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    base, kind = Path(sys.argv[1]), {"store": Stored, "naive": Naive}[sys.argv[2]]
    prepared = base / "prepared"
    for step in (1, 2, 3):
        kind(prepared).save(snapshot(step), step)
    points, bad = 0, []
    for mode in (0, 1, 2):
        n = 0
        while True:
            n += 1
            folder = base / "run"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(prepared, folder, copy_function=os.link)
            if kind is Naive:  # it writes in place, which links would share
                shutil.rmtree(folder)
                shutil.copytree(prepared, folder)
            if not killed_in_save(folder, kind, n, mode):
                break
            points += 1
            try:
                value = kind(folder).newest()
                if value not in (3, 4):
                    bad.append(f"mode {mode}, call {n}: restored {value}")
                store = kind(folder)
                store.save(snapshot(5), 5)  # nothing is in the way of the next
                if store.newest() != 5:
                    bad.append(f"mode {mode}, call {n}: the next save is lost")
            except (StateError, OSError, ValueError, RuntimeError) as error:
                bad.append(f"mode {mode}, call {n}: {error}")
    print(json.dumps({"points": points, "bad": bad}))


if __name__ == "__main__":
    main()
