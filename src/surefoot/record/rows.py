r"""The step log as it lies in a directory: its format, and reading it, also while it is being written.

::

    steps/rows.bin    header, then blocks of up to 256 rows, column by column, each with a CRC
    steps/tail.bin    memory-mapped ring of the last 4,096 rows, each with a CRC

``rows.bin``: ``SFROWS1\n``, uint32 length of the header, the header (JSON: columns and their types, id
of the run), uint32 CRC of it. A block: ``SFBK``, uint32 rows, uint64 index of the first row, uint32 CRC of
rows, index and payload, payload: the columns one after another, eight bytes a value.

``tail.bin``: ``SFTAIL1\n``, uint64 bytes of a slot, uint64 number of rows that are in blocks, uint64 number
of events written, zeros up to byte 64, then the slots: row i, and a CRC over it and i, in slot i mod 4,096.
Little-endian throughout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from surefoot.errors import FormatError, StateError
from surefoot.record.columns import COLUMNS, Column, Columns

Words = NDArray[np.uint64]
Damage = tuple[str, int, str]
"""File, byte offset, and what is wrong there."""

MAGIC, TAIL_MAGIC, BLOCK_MAGIC = b"SFROWS1\n", b"SFTAIL1\n", b"SFBK"
BLOCK = struct.Struct("<4sIQI")
SEALED_AT, EVENTS_AT, TAIL_HEADER = 16, 24, 64
SEAL_ROWS, RING_ROWS = 256, 4096
CLOCK = 0xFFFFFFFF


def header_of(columns: Sequence[Column], run: str) -> bytes:
    """The first bytes of ``rows.bin``."""
    text = json.dumps({"columns": [[c.name, c.kind] for c in columns], "run": run}).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", crc32(head))


def block_check(num_rows: int, index: int, payload: bytes) -> int:
    """CRC of a block."""
    return crc32(payload, crc32(struct.pack("<IQ", num_rows, index)))


# ---------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Scan:
    """What a blocks file holds: (index of the first row, columns x rows) of each sound block.

    run: whose it is; empty if that is not known. start, end: bytes at which blocks begin and end.
    """

    columns: list[tuple[str, str]]
    blocks: list[tuple[int, Words]]
    start: int
    end: int
    damage: list[tuple[int, str]]
    run: str = ""

    @property
    def next_index(self) -> int:
        """Index of the row after the last sealed one."""
        return self.blocks[-1][0] + self.blocks[-1][1].shape[1] if self.blocks else 0

    def gaps(self) -> Iterator[range]:
        """Rows that are in no sound block though later ones are."""
        expected = 0
        for index, rows in self.blocks:
            if index > expected:
                yield range(expected, index)
            expected = index + rows.shape[1]


def scan_blocks(path: Path) -> Scan:
    """Reads a blocks file, skipping what is damaged. If its header is, the columns are taken to be those
    of this version.

    Raises:
        StateError: it is no blocks file, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.") from error
    known = [(c.name, str(c.kind)) for c in COLUMNS]
    damage: list[tuple[int, str]] = []
    try:
        (length,) = struct.unpack_from("<I", data, len(MAGIC))
        at = len(MAGIC) + 4 + length
        (check,) = struct.unpack_from("<I", data, at)
        if crc32(data[:at]) != check:
            raise ValueError
        if data[: len(MAGIC)] != MAGIC:
            raise FormatError(
                f"{path} has a format that this version does not read.",
                fix="Use the version of surefoot that wrote it.",
            )
        header = json.loads(data[len(MAGIC) + 4 : at])
        columns, run = [(name, kind) for name, kind in header["columns"]], str(header.get("run", ""))
        position = at + 4
    except (ValueError, struct.error):
        damage.append((0, "damaged header"))
        columns, run, position = known, "", data.find(BLOCK_MAGIC)
        if position < 0 and data[: len(MAGIC)] != MAGIC:
            raise StateError(f"{path} is not a readable step log.") from None
        position = len(data) if position < 0 else position
    width, start, end = 8 * len(columns), position, position
    blocks: list[tuple[int, Words]] = []
    while position < len(data):
        block = _block_at(data, position, width)
        if block is None:
            following = data.find(BLOCK_MAGIC, position + 1)
            damage.append((position, "torn block at the end" if following < 0 else "damaged block"))
            if following < 0:
                break
            position = following
            continue
        position += BLOCK.size + block[1].nbytes
        end = position
        blocks.append(block)
    return Scan(columns, blocks, start, end, _merge(damage), run)


def _block_at(data: bytes, at: int, width: int) -> tuple[int, Words] | None:
    """Index of the first row and the values (columns x rows), or None if no sound block is here."""
    if len(data) < at + BLOCK.size:
        return None
    magic, num_rows, index, check = BLOCK.unpack_from(data, at)
    payload = data[at + BLOCK.size : at + BLOCK.size + num_rows * width]
    if magic != BLOCK_MAGIC or len(payload) != num_rows * width or not num_rows:
        return None
    if block_check(num_rows, index, payload) != check:
        return None
    return index, np.frombuffer(payload, np.uint64).reshape(width // 8, num_rows)


def _merge(damage: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """One finding per damaged stretch, not one per false start within it."""
    return [d for i, d in enumerate(damage) if i == 0 or d[1] != damage[i - 1][1]]


# ---------------------------------------------------------------------------------- the ring


@dataclass(frozen=True)
class Ring:
    """A copy of ``tail.bin``. sealed, num_events: as its header has them."""

    data: bytes
    slot: int
    sealed: int
    num_events: int

    def at(self, index: int) -> bytes | None:
        """Row `index`, if its slot holds it whole."""
        at = TAIL_HEADER + index % RING_ROWS * self.slot
        row = self.data[at : at + self.slot - 8]
        check = int.from_bytes(self.data[at + self.slot - 8 : at + self.slot], "little")
        return row if crc32(row, index & CLOCK) == check else None

    def rows(self, indices: range, *, to_first_gap: bool) -> tuple[int, Words]:
        """Sound rows among `indices`, in order (rows x columns), and the index of the first."""
        found, first = [], -1
        for index in indices:
            row = self.at(index)
            if row is not None:
                first = index if first < 0 else first
                found.append(np.frombuffer(row, np.uint64))
            elif to_first_gap or found:
                break
        return first, np.array(found, np.uint64).reshape(len(found), self.slot // 8 - 1)

    def after(self, sealed: int) -> tuple[int, Words]:
        """The rows that are in no block, given how many are, and the index of the first. If blocks were
        lost, the oldest that the ring still has come first.
        """
        first, rows = self.rows(range(sealed, sealed + RING_ROWS), to_first_gap=True)
        if len(rows) or self.sealed <= sealed:
            return max(first, sealed), rows
        begin = max(sealed, self.sealed - RING_ROWS)
        first, rows = self.rows(range(begin, begin + RING_ROWS), to_first_gap=False)
        return (first, rows) if len(rows) else (sealed, rows)


def ring_of(data: bytes) -> Ring | None:
    """The ring in the bytes of a ``tail.bin``; None if they are none."""
    if len(data) < TAIL_HEADER or data[:8] != TAIL_MAGIC:
        return None
    slot, sealed, num_events = struct.unpack_from("<QQQ", data, 8)
    if slot < 16 or slot % 8 or len(data) != TAIL_HEADER + RING_ROWS * slot:
        return None
    return Ring(data, slot, sealed, num_events)


def read_ring(folder: Path) -> Ring | None:
    """The ring of a log; None if there is none or it is damaged beyond use."""
    try:
        return ring_of((folder / "tail.bin").read_bytes())
    except OSError:
        return None


# ---------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class LogFile:
    """All rows of a log, in the order they were written, and what of it is damaged."""

    columns: Columns
    damage: list[Damage]


def read_log(folder: Path) -> LogFile:
    """Reads a step log, also one that is being written. What blocks have lost is taken from the ring as far
    as it goes back.

    Raises:
        StateError: ``rows.bin`` is there and is no step log.
    """
    ring = read_ring(folder)  # before the blocks: what is sealed meanwhile is then in both
    known = [(c.name, str(c.kind)) for c in COLUMNS]
    damage: list[Damage] = []
    if (folder / "rows.bin").exists():
        scan = scan_blocks(folder / "rows.bin")
    else:
        scan = Scan(known, [], 0, 0, [])
        if ring is not None and ring.sealed:
            damage.append(("rows.bin", 0, "the file is missing"))
    parts: dict[int, Words] = dict(scan.blocks)
    torn = scan.damage and scan.damage[-1][1].startswith("torn")
    if ring is not None and ring.slot == 8 * len(scan.columns) + 8:
        for gap in scan.gaps():
            first, rows = ring.rows(gap, to_first_gap=False)
            if len(rows):
                parts[first] = rows.T
        first, rows = ring.after(scan.next_index)
        if len(rows):
            parts[first] = rows.T
        if torn and first == scan.next_index and len(rows):
            scan.damage.pop()  # being sealed right now, or killed then: the ring has these rows
    damage += [("rows.bin", offset, what) for offset, what in scan.damage]
    return LogFile(_columns(scan.columns, [parts[index] for index in sorted(parts)]), damage)


def read_newest(folder: Path, most: int) -> Columns:
    """The newest rows, up to `most`: cheap, for those who look often."""
    ring = ring_of((folder / "tail.bin").read_bytes())
    names = [(c.name, str(c.kind)) for c in COLUMNS]
    if ring is None:
        return _columns(names, [])
    begin = max(0, ring.sealed - min(most, RING_ROWS - SEAL_ROWS))
    _, rows = ring.rows(range(begin, begin + RING_ROWS), to_first_gap=True)
    return _columns(names, [rows[-most:].T] if len(rows) else [])


def check_log(folder: Path, *, run: str, live: bool, ended: bool, num_events: int) -> list[Damage]:
    """What of a log is not as it was written: every block, every slot of the ring, that both are of this
    run, and that nothing is missing at the end.

    Args:
        run: its id.
        live: it is being written; what may change meanwhile is left out.
        ended: its writer closed it; else a kill may have torn the row after the newest.
        num_events: events that the run has.
    """
    try:
        found = read_log(folder).damage
        scan = scan_blocks(folder / "rows.bin") if (folder / "rows.bin").exists() else None
    except StateError as error:
        return [("rows.bin", 0, error.what)]
    if scan is not None and scan.run not in ("", run):
        found.append(("rows.bin", len(MAGIC) + 4, f"belongs to another run, {scan.run}"))
    path = folder / "tail.bin"
    if scan is None and not path.exists():
        return found
    ring = read_ring(folder)
    if ring is None:
        what = "damaged header or wrong size" if path.exists() else "the file is missing"
        return [*found, ("tail.bin", 0, what)]
    if live or scan is None:
        return found
    if any(ring.data[EVENTS_AT + 8 : TAIL_HEADER]) or ring.slot != 8 * len(scan.columns) + 8:
        found.append(("tail.bin", 8, "damaged header"))
        return found
    if ring.sealed > scan.next_index:
        lost = ring.sealed - scan.next_index
        found.append(("rows.bin", scan.end, f"{lost:,} rows are missing at the end"))
    elif ring.sealed < scan.next_index and ring.after(scan.next_index)[1].size == 0:
        found.append(("tail.bin", SEALED_AT, "damaged header"))
    if ring.num_events > num_events:
        found.append(("../events.jsonl", 0, f"{ring.num_events - num_events} events are missing"))
    found += _check_slots(ring, max(ring.sealed, scan.next_index), ended=ended)
    return found + _check_same(ring, scan)


def _check_slots(ring: Ring, sealed: int, *, ended: bool) -> list[Damage]:
    """Slots that hold neither the row that belongs there nor, before the first round, zeros."""
    count = sealed + len(ring.rows(range(sealed, sealed + RING_ROWS), to_first_gap=True)[1])
    found: list[Damage] = []
    for slot in range(RING_ROWS):
        newest = count - 1 - (count - 1 - slot) % RING_ROWS if count else -1
        begin = TAIL_HEADER + slot * ring.slot
        if newest < 0:
            sound = not any(ring.data[begin : begin + ring.slot])
        else:
            sound = ring.at(newest) is not None
        if not sound and (ended or slot != count % RING_ROWS):
            found.append(
                ("tail.bin", begin, "damaged row" if newest >= 0 else "bytes where none were written")
            )
    return found


def _check_same(ring: Ring, scan: Scan) -> list[Damage]:
    """Rows of the newest block that the ring has otherwise: it is of another run."""
    for index, block in scan.blocks[-1:]:
        for i, row in enumerate(block.T):
            slot = (index + i) % RING_ROWS
            if ring.at(index + i) not in (None, row.tobytes()):
                return [("tail.bin", TAIL_HEADER + slot * ring.slot, "rows that rows.bin has otherwise")]
    return []


def _columns(names: list[tuple[str, str]], parts: list[Words]) -> Columns:
    words = np.concatenate(parts, axis=1) if parts else np.empty((len(names), 0), np.uint64)
    columns: Columns = {}
    for (name, kind), column in zip(names, words, strict=True):
        columns[name] = np.ascontiguousarray(column).view(np.int64 if kind == "q" else np.float64)
    if "permitted" in columns:
        columns["permitted"] = columns["permitted"].astype(bool)
    return columns
