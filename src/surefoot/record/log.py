r"""The step log: one fixed row per update, at about a microsecond, surviving ``kill -9``.

::

    steps/rows.bin    header, then blocks of up to 256 rows, column by column, each with a CRC
    steps/tail.bin    memory-mapped ring of the last 4,096 rows, each with a CRC

A row is copied into the ring with a CRC over it and its index: a memory write, which the kernel keeps
when the process dies. Every 256 rows the ring's newest are sealed into a block. A reader joins the
blocks with the rows of the ring that are not sealed yet, as far as their CRCs hold, at any time, also
while the run goes on.

``rows.bin``: ``SFROWS1\n``, uint32 length of the header, the header (JSON: columns and their types),
uint32 CRC of it. A block: ``SFBK``, uint32 rows, uint64 index of the first row, uint32 CRC of rows, index
and payload, payload: the columns one after another, eight bytes a value. Little-endian throughout.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from surefoot.errors import StateError
from surefoot.record.columns import COLUMNS, Column, Columns

_MAGIC = b"SFROWS1\n"
_TAIL_MAGIC = b"SFTAIL1\n"
_BLOCK = struct.Struct("<4sIQI")
_BLOCK_MAGIC = b"SFBK"
_pack_check = struct.Struct("<Q").pack
_SEALED_AT, _TAIL_HEADER = 16, 64
SEAL_ROWS = 256
RING_ROWS = 4096


class StepLog:
    """Writes rows; one writer at a time. Opening an existing log continues it.

    Args:
        folder: ``steps/`` of a run.
        columns: their names and kinds; an existing log must have the same.
    """

    def __init__(self, folder: Path, columns: Sequence[Column] = COLUMNS) -> None:
        folder.mkdir(exist_ok=True)
        self._width = 8 * len(columns)
        self._slot = self._width + 8
        self._pack = struct.Struct("<" + "".join(c.kind for c in columns)).pack
        self._blocks, sealed = self._open_blocks(folder / "rows.bin", columns)
        self._sealed = sealed
        self._tail = self._open_tail(folder / "tail.bin", sealed)
        self._count = sealed + len(_valid_tail(bytes(self._tail), sealed))

    def append(self, values: Sequence[int | float]) -> None:
        """Adds a row: one value per column. Survives the death of the process from here on."""
        row = self._pack(*values)
        index = self._count
        at = _TAIL_HEADER + index % RING_ROWS * self._slot
        self._tail[at : at + self._slot] = row + _pack_check(crc32(row, index))
        self._count = index = index + 1
        if index - self._sealed >= SEAL_ROWS:
            self._seal_or_wait()

    def __len__(self) -> int:
        return int(self._count)

    def _seal_or_wait(self) -> None:
        """Seals; if the disk refuses, the ring holds the rows and it is tried again later."""
        try:
            self.seal()
        except OSError:
            if self._count - self._sealed > RING_ROWS - SEAL_ROWS:
                raise

    def seal(self) -> None:
        """Writes the rows that only the ring holds as a block."""
        if self._count == self._sealed:
            return
        ring = np.frombuffer(self._tail, np.uint64, RING_ROWS * self._slot // 8, _TAIL_HEADER)
        ring = ring.reshape(RING_ROWS, self._slot // 8)[:, :-1]
        first, num_rows = self._sealed % RING_ROWS, self._count - self._sealed
        rows = ring[first : first + num_rows]
        if len(rows) < num_rows:  # around the end of the ring
            rows = np.concatenate([rows, ring[: num_rows - len(rows)]])
        self._append_block(num_rows, rows.T.tobytes())
        self._sealed = self._count
        struct.pack_into("<Q", self._tail, _SEALED_AT, self._sealed)

    def _append_block(self, num_rows: int, payload: bytes) -> None:
        check = _block_crc(num_rows, self._sealed, payload)
        data = memoryview(_BLOCK.pack(_BLOCK_MAGIC, num_rows, self._sealed, check) + payload)
        end = os.lseek(self._blocks, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._blocks, data) :]
        except OSError:
            os.ftruncate(self._blocks, end)
            raise

    def sync(self) -> None:
        """Seals, and makes everything durable against a power cut."""
        self.seal()
        os.fsync(self._blocks)

    def close(self) -> None:
        """Seals, syncs and lets go of the files."""
        try:
            self.sync()
        finally:
            os.close(self._blocks)
            self._tail.close()

    def _open_blocks(self, path: Path, columns: Sequence[Column]) -> tuple[int, int]:
        header = json.dumps({"columns": [[c.name, c.kind] for c in columns]}).encode()
        head = _MAGIC + struct.pack("<I", len(header)) + header
        head += struct.pack("<I", crc32(head))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(fd).st_size < len(head):  # new, or killed while it was made
            os.ftruncate(fd, 0)
            os.pwrite(fd, head, 0)
            return fd, 0
        scan = scan_blocks(path)
        if [name for name, _ in scan.columns] != [c.name for c in columns]:
            os.close(fd)
            raise StateError(
                f"{path} has other columns than this version writes.",
                fix="Continue the run with the version that began it.",
            )
        os.ftruncate(fd, scan.end)  # a torn last block: its rows are still in the ring
        return fd, scan.next_index

    def _open_tail(self, path: Path, sealed: int) -> mmap.mmap:
        size = _TAIL_HEADER + RING_ROWS * self._slot
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, size)  # or a full disk would be a SIGBUS later
            tail = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        tail[:8] = _TAIL_MAGIC
        struct.pack_into("<QQ", tail, 8, self._slot, sealed)
        return tail


@dataclass(frozen=True)
class Scan:
    """What a blocks file holds. `damage`: byte offset and reason of each place that is not sound."""

    columns: list[tuple[str, str]]
    blocks: list[tuple[int, NDArray[np.uint64]]]
    end: int
    damage: list[tuple[int, str]]

    @property
    def next_index(self) -> int:
        """Index of the row after the last sealed one."""
        return self.blocks[-1][0] + self.blocks[-1][1].shape[1] if self.blocks else 0


def scan_blocks(path: Path) -> Scan:
    """Reads a blocks file, skipping what is damaged.

    Raises:
        StateError: the header itself cannot be read.
    """
    try:
        data = path.read_bytes()
        (length,) = struct.unpack_from("<I", data, len(_MAGIC))
        at = len(_MAGIC) + 4 + length
        (check,) = struct.unpack_from("<I", data, at)
        if data[: len(_MAGIC)] != _MAGIC or crc32(data[:at]) != check:
            raise ValueError("header damaged")
        header: dict[str, Any] = json.loads(data[len(_MAGIC) + 4 : at])
    except (OSError, ValueError, struct.error) as error:
        raise StateError(f"{path} is not a readable step log: {error}") from error
    columns = [(name, kind) for name, kind in header["columns"]]
    width, position = 8 * len(columns), at + 4
    end = position
    blocks: list[tuple[int, NDArray[np.uint64]]] = []
    damage: list[tuple[int, str]] = []
    while position < len(data):
        block = _block_at(data, position, width)
        if block is None:
            following = data.find(_BLOCK_MAGIC, position + 1)
            reason = "torn block at the end" if following < 0 else "damaged block"
            damage.append((position, reason))
            if following < 0:
                break
            position = following
            continue
        index, rows = block
        position += _BLOCK.size + rows.nbytes
        end = position
        blocks.append((index, rows))
    return Scan(columns, blocks, end, _merge(damage))


def _block_at(data: bytes, at: int, width: int) -> tuple[int, NDArray[np.uint64]] | None:
    """Index of the first row and the values (columns x rows), or None if no sound block is here."""
    if len(data) < at + _BLOCK.size:
        return None
    magic, num_rows, index, check = _BLOCK.unpack_from(data, at)
    payload = data[at + _BLOCK.size : at + _BLOCK.size + num_rows * width]
    if magic != _BLOCK_MAGIC or len(payload) != num_rows * width:
        return None
    if _block_crc(num_rows, index, payload) != check:
        return None
    return index, np.frombuffer(payload, np.uint64).reshape(width // 8, num_rows)


def _block_crc(num_rows: int, index: int, payload: bytes) -> int:
    return crc32(payload, crc32(struct.pack("<IQ", num_rows, index)))


def _merge(damage: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """One finding per damaged stretch, not one per false start within it."""
    return damage[:1] if len(damage) > 1 and damage[0][1] == damage[-1][1] else damage


def _valid_tail(tail: bytes, start: int) -> NDArray[np.uint64]:
    """Sound rows of the ring from index `start` on: rows x columns."""
    if tail[:8] != _TAIL_MAGIC or len(tail) < _TAIL_HEADER:
        return np.empty((0, 0), np.uint64)
    (slot,) = struct.unpack_from("<Q", tail, 8)
    if slot < 16 or len(tail) != _TAIL_HEADER + RING_ROWS * slot:
        return np.empty((0, 0), np.uint64)
    rows = []
    for index in range(start, start + RING_ROWS):
        at = _TAIL_HEADER + (index % RING_ROWS) * slot
        row = tail[at : at + slot - 8]
        check = int.from_bytes(tail[at + slot - 8 : at + slot], "little")
        if crc32(row, index & 0xFFFFFFFF) != check:
            break
        rows.append(np.frombuffer(row, np.uint64))
    return np.array(rows, np.uint64).reshape(len(rows), (slot - 8) // 8)


@dataclass(frozen=True)
class LogFile:
    """All rows of a log, in the order they were written, and what of it is damaged."""

    columns: Columns
    damage: list[tuple[int, str]]


def read_log(folder: Path) -> LogFile:
    """Reads a step log, also one that is being written.

    Raises:
        StateError: the log's header cannot be read.
    """
    if not (folder / "rows.bin").exists():
        return LogFile(_columns([(c.name, c.kind) for c in COLUMNS], []), [])
    try:
        tail = (folder / "tail.bin").read_bytes()  # before the blocks: what is sealed meanwhile
    except OSError:  # is then in both
        tail = b""
    scan = scan_blocks(folder / "rows.bin")
    parts = [rows for _, rows in scan.blocks]
    unsealed = _valid_tail(tail, scan.next_index)
    if unsealed.size:
        parts.append(unsealed.T)
    damage = scan.damage
    if unsealed.size and damage and damage[-1][1].startswith("torn"):
        damage = damage[:-1]  # being sealed right now, or killed then: the ring has these rows
    return LogFile(_columns(scan.columns, parts), damage)


def read_newest(folder: Path, most: int) -> Columns:
    """The newest rows, up to `most`: cheap, for those who look often."""
    tail = (folder / "tail.bin").read_bytes()
    sealed = struct.unpack_from("<Q", tail, _SEALED_AT)[0] if len(tail) >= _TAIL_HEADER else 0
    rows = _valid_tail(tail, max(0, sealed - min(most, RING_ROWS - SEAL_ROWS)))[-most:]
    names = [(c.name, str(c.kind)) for c in COLUMNS]
    return _columns(names, [rows.T] if rows.size else [])


def _columns(names: list[tuple[str, str]], parts: list[NDArray[np.uint64]]) -> Columns:
    words = np.concatenate(parts, axis=1) if parts else np.empty((len(names), 0), np.uint64)
    columns: Columns = {}
    for (name, kind), column in zip(names, words, strict=True):
        columns[name] = np.ascontiguousarray(column).view(np.int64 if kind == "q" else np.float64)
    if "permitted" in columns:
        columns["permitted"] = columns["permitted"].astype(bool)
    return columns
