"""Writing the step log: one fixed row per update, at about a microsecond, surviving ``kill -9``.

A row is copied into the ring with a CRC over it and its index: a memory write, which the kernel keeps
when the process dies. Every 256 rows the ring's newest are sealed into a block. A reader joins the
blocks with the rows of the ring that are not sealed yet; see `rows` for the format.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import numpy as np

from surefoot.errors import StateError
from surefoot.record.columns import COLUMNS, Column
from surefoot.record.rows import (
    BLOCK,
    BLOCK_MAGIC,
    CLOCK,
    EVENTS_AT,
    RING_ROWS,
    SEAL_ROWS,
    SEALED_AT,
    TAIL_HEADER,
    TAIL_MAGIC,
    block_check,
    header_of,
    read_ring,
    scan_blocks,
)

_pack_check = struct.Struct("<Q").pack
_MOST_WAITING = 4096
"""Blocks (a million rows) that wait in memory for a disk that takes none."""


class StepLog:
    """Writes rows; one writer at a time. Opening an existing log continues it.

    If the disk takes no block, the ring holds the newest 4,096 rows and memory the ones before, and each
    further block tries again; so a full disk costs rows only if the process is killed before it has room.

    Args:
        folder: ``steps/`` of a run.
        run: its id.
        columns: the names and kinds of what `append` gets; of an existing log that has fewer of them, what
            it has goes on being written.
    """

    def __init__(self, folder: Path, run: str = "", columns: Sequence[Column] = COLUMNS) -> None:
        folder.mkdir(exist_ok=True)
        ring = read_ring(folder)
        self._blocks, in_blocks, has = self._open_blocks(folder / "rows.bin", columns, run)
        self._slot = 8 * len(has) + 8
        self._pack = struct.Struct("<" + "".join(c.kind for c in has)).pack
        self._picks = None if len(has) == len(columns) else [columns.index(c) for c in has]
        first, unsealed = in_blocks, 0
        if ring is not None and ring.slot == self._slot:
            first, rows = ring.after(in_blocks)
            unsealed = len(rows)
        self._sealed, self._count = first, first + unsealed
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        self._tail = self._open_tail(folder / "tail.bin")

    def append(self, values: Sequence[int | float]) -> None:
        """Adds a row: one value per column. Survives the death of the process from here on."""
        row = self._pack(*values) if self._picks is None else self._pack(*(values[i] for i in self._picks))
        index = self._count
        at = TAIL_HEADER + index % RING_ROWS * self._slot
        self._tail[at : at + self._slot] = row + _pack_check(crc32(row, index & CLOCK))
        self._count = index = index + 1
        if index - self._sealed >= SEAL_ROWS:
            self.seal()

    def __len__(self) -> int:
        return self._count

    @property
    def num_waiting(self) -> int:
        """Rows that only memory holds since the disk does not take them."""
        return sum(num_rows for _, num_rows, _ in self._waiting)

    def note_events(self, num_events: int) -> None:
        """Writes down how many events there are, so that a file that lost its end is noticed."""
        struct.pack_into("<Q", self._tail, EVENTS_AT, num_events)

    def seal(self) -> OSError | None:
        """Writes the rows that only the ring holds as a block; what the disk says if it takes none.

        Rows that it does not take stay in the ring until that would overwrite them, then in memory.
        """
        num_rows = self._count - self._sealed
        if num_rows:
            ring = np.frombuffer(self._tail, np.uint64, RING_ROWS * self._slot // 8, TAIL_HEADER)
            ring = ring.reshape(RING_ROWS, self._slot // 8)[:, :-1]
            where = np.arange(self._sealed, self._count) % RING_ROWS
            self._waiting.append((self._sealed, num_rows, ring[where].T.tobytes()))
            self._sealed = self._count
            del ring  # an error that is handed on would hold it
        try:
            while self._waiting:
                self._write_block(*self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            while len(self._waiting) > _MOST_WAITING:
                self._waiting.popleft()
            return error
        struct.pack_into("<Q", self._tail, SEALED_AT, self._sealed)
        return None

    def _write_block(self, index: int, num_rows: int, payload: bytes) -> None:
        check = block_check(num_rows, index, payload)
        data = memoryview(BLOCK.pack(BLOCK_MAGIC, num_rows, index, check) + payload)
        end = os.lseek(self._blocks, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._blocks, data) :]
        except OSError:
            os.ftruncate(self._blocks, end)
            raise

    def make_durable(self) -> None:
        """Makes what is sealed durable against a power cut; may be called from another thread."""
        os.fsync(self._blocks)

    def close(self) -> None:
        """Seals, syncs and lets go of the files.

        Raises:
            OSError: the disk does not take the last rows.
        """
        try:
            trouble = self.seal()
            if trouble is not None:
                raise trouble
            self.make_durable()
        finally:
            os.close(self._blocks)
            with suppress(BufferError):  # of an error that came in `seal`, and still holds it
                self._tail.close()

    def _open_blocks(
        self, path: Path, columns: Sequence[Column], run: str
    ) -> tuple[int, int, Sequence[Column]]:
        """The file, ready to be added to; the index of the next row by what it holds; and its columns:
        those that the version which began it had.
        """
        head = header_of(columns, run)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        begun = os.pread(fd, len(head), 0)
        if len(begun) < len(head) and head.startswith(begun):  # new, or killed while it was made
            os.ftruncate(fd, 0)
            os.pwrite(fd, head, 0)
            return fd, 0, columns
        scan = scan_blocks(path)
        by_name = {c.name: c for c in columns}
        found = [by_name.get(name) for name, _ in scan.columns]
        if [(c.name, c.kind) for c in found if c] != scan.columns:
            os.close(fd)
            raise StateError(
                f"{path} has columns that this version does not write.",
                fix="Continue the run with the version that began it.",
            )
        if scan.damage and scan.damage[0][0] == 0 and scan.start == len(head):
            os.pwrite(fd, head, 0)
        os.ftruncate(fd, max(scan.start, scan.end))  # a torn last block: its rows are still in the ring
        return fd, scan.next_index, [c for c in found if c]

    def _open_tail(self, path: Path) -> mmap.mmap:
        size = TAIL_HEADER + RING_ROWS * self._slot
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)  # or a full disk would be a SIGBUS later
            tail = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        tail[:TAIL_HEADER] = (
            TAIL_MAGIC + struct.pack("<QQ", self._slot, self._sealed) + bytes(TAIL_HEADER - 24)
        )
        return tail
