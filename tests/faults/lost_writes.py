"""What a disk may hold after a power cut, made from a record of what was asked of it.

`Disk` records every change that code makes below a folder: data written to files, and names made, moved and
removed in folders. What was not synced when the power goes may be there or not, each change by itself, in
any order, and a write may be there in part; what was synced is there. Data is synced by `fsync` of the
file, names by `fsync` of their folder. (After Pillai et al., "All File Systems Are Not Created Equal", OSDI
2014, without the promises that some file systems make beyond POSIX.)
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import surefoot.checkpoint.files
import surefoot.checkpoint.store


@dataclass
class Node:
    """A file or folder. durable, pending: names of a folder or data of a file."""

    folder: bool
    changes: list[Change] = field(default_factory=list)
    twin: Node | None = None


@dataclass
class Change:
    """data: (offset, bytes) of a file; names: (name, node or None) of a folder, together."""

    data: tuple[int, bytes] | None = None
    names: tuple[tuple[str, Node | None], ...] = ()
    synced: bool = False


@dataclass
class Moment:
    """After so many changes, which of them were synced, and the newest step whose save had returned."""

    num_changes: int
    synced: frozenset[int]
    committed: int


class Disk:
    """Records changes below `root`, which exists already."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[Node, Change]] = []
        self.moments: list[Moment] = []
        self.committed = 0
        self._top = Node(True)
        self._paths: dict[str, Node] = {str(root): self._top}
        self._files: dict[int, tuple[Node, int]] = {}

    def _add(self, node: Node, change: Change) -> None:
        node.changes.append(change)
        self.log.append((node, change))
        self._mark()

    def _mark(self) -> None:
        synced = frozenset(i for i, (_, c) in enumerate(self.log) if c.synced)
        self.moments.append(Moment(len(self.log), synced, self.committed))

    def _known(self, path: Any) -> str | None:
        text = os.fspath(path)
        return text if isinstance(text, str) and text.startswith(str(self.root)) else None

    def _named(self, text: str, node: Node | None) -> None:
        parent, name = os.path.split(text)
        if node is None:
            self._paths.pop(text, None)
        else:
            self._paths[text] = node
        self._add(self._paths[parent], Change(names=((name, node),)))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watches the calls of `os` that the store makes."""
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "rename", "link")}
        real |= {name: getattr(os, name) for name in ("unlink", "rmdir", "close")}
        tree = shutil.rmtree

        def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            text, new = self._known(path), False
            if text is not None and flags & os.O_CREAT and not os.path.exists(text):
                new = True
            fd: int = real["open"](path, flags, *rest, **more)
            if text is not None:
                if new:
                    self._named(text, Node(False))
                if text in self._paths:
                    self._files[fd] = (self._paths[text], 0)
            return fd

        def write(fd: int, data: Any) -> int:
            done: int = real["write"](fd, data)
            if fd in self._files:
                node, at = self._files[fd]
                self._files[fd] = (node, at + done)
                self._add(node, Change(data=(at, bytes(memoryview(data)[:done]))))
            return done

        def fsync(fd: int) -> None:
            real["fsync"](fd)
            if fd in self._files:
                for change in self._files[fd][0].changes:
                    change.synced = True
                self._mark()

        def close(fd: int) -> None:
            self._files.pop(fd, None)
            real["close"](fd)

        def mkdir(path: Any, *rest: Any, **more: Any) -> None:
            real["mkdir"](path, *rest, **more)
            text = self._known(path)
            if text is not None:
                self._named(text, Node(True))

        def rename(a: Any, b: Any, **more: Any) -> None:
            real["rename"](a, b, **more)
            old, new = self._known(a), self._known(b)
            if old is None or new is None:
                return
            node = self._paths.pop(old)
            for text in [t for t in self._paths if t.startswith(old + "/")]:
                self._paths[new + text[len(old) :]] = self._paths.pop(text)
            self._paths[new] = node
            assert os.path.dirname(old) == os.path.dirname(new)
            names = ((os.path.basename(old), None), (os.path.basename(new), node))
            self._add(self._paths[os.path.dirname(old)], Change(names=names))

        def link(a: Any, b: Any, **more: Any) -> None:
            real["link"](a, b, **more)
            old, new = self._known(a), self._known(b)
            if old is not None and new is not None:
                self._named(new, self._paths[old])

        def unlink(path: Any, **more: Any) -> None:
            real["unlink"](path, **more)
            text = self._known(path)
            if text is not None and "dir_fd" not in more:
                self._named(text, None)

        def rmtree(path: Any, *rest: Any, **more: Any) -> None:
            tree(path, *rest, **more)
            text = self._known(path)
            if text is None or text not in self._paths:
                return
            for below in sorted((t for t in self._paths if t.startswith(text + "/")), reverse=True):
                self._named(below, None)
            self._named(text, None)

        with contextlib.ExitStack() as stack:
            for name, fake in (
                ("open", open_), ("write", write), ("fsync", fsync), ("close", close), ("mkdir", mkdir),
                ("rename", rename), ("link", link), ("unlink", unlink),
            ):  # fmt: skip
                setattr(os, name, fake)
                stack.callback(setattr, os, name, real[name])
            shutil.rmtree = rmtree  # type: ignore[assignment]
            stack.callback(setattr, shutil, "rmtree", tree)
            store = surefoot.checkpoint.store
            stack.callback(setattr, store, "rename_new", store.rename_new)
            store.rename_new = rename
            yield

    def saved(self, step: int) -> None:
        """A save has returned: from now on that state must never be lost."""
        self.committed = step
        self._mark()

    def after_power_cut(self, rng: random.Random, target: Path) -> int:
        """Writes into `target` one state that the disk may be in after a power cut at a random moment; the
        newest step that was promised then.
        """
        moment = rng.choice(self.moments)
        share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        there = {i for i in range(moment.num_changes) if i in moment.synced or rng.random() < share}
        names: dict[int, dict[str, Node]] = {}
        data: dict[int, bytearray] = {}
        for i in sorted(there):
            node, change = self.log[i]
            if change.data is not None:
                at, block = change.data
                if i not in moment.synced and rng.random() < 0.3:
                    block = block[: rng.randrange(len(block) + 1)]  # in part
                held = data.setdefault(id(node), bytearray())
                if len(held) < at + len(block):
                    held.extend(bytes(at + len(block) - len(held)))
                held[at : at + len(block)] = block
            for name, child in change.names:
                entries = names.setdefault(id(node), {})
                entries.pop(name, None)
                if child is not None:
                    entries[name] = child
        self._write(self._top, target, names, data)
        return moment.committed

    def _write(
        self, node: Node, path: Path, names: dict[int, dict[str, Node]], data: dict[int, bytearray]
    ) -> None:
        path.mkdir()
        for name, child in names.get(id(node), {}).items():
            if child.folder:
                self._write(child, path / name, names, data)
            else:
                (path / name).write_bytes(bytes(data.get(id(child), b"")))
