"""The step log: no row is lost to a kill, what is damaged is found, and the rest can be read."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import surefoot
from hypothesis import given, settings
from hypothesis import strategies as st

import surefoot as sf
from surefoot.record.columns import COLUMNS, Column, lineage
from surefoot.record.events import Events, event_lineage, read_events
from surefoot.record.log import StepLog
from surefoot.record.rows import RING_ROWS, SEAL_ROWS, read_log, read_newest


def row(i):
    return [i, 1, *[i + k for k in range(6)], *[i / 3 + k for k in range(len(COLUMNS) - 8)]]


def expected(steps):
    return np.array([row(i) for i in steps], float).T


def assert_rows(columns, steps):
    got = np.array([values.astype(float) for name, values in columns.items() if name != "permitted"])
    keep = [i for i, c in enumerate(COLUMNS) if c.name != "permitted"]
    assert np.array_equal(got, expected(steps)[keep]) if len(steps) else got.shape[1] == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 * SEAL_ROWS), min_size=1, max_size=5), st.booleans())
def test_what_is_written_is_read_over_any_number_of_attempts(tmp_path_factory, lengths, tidy):
    folder = tmp_path_factory.mktemp("run") / "steps"
    total = 0
    for length in lengths:
        log = StepLog(folder)
        assert len(log) == total
        for i in range(total, total + length):
            log.append(row(i))
        total += length
        assert_rows(read_log(folder).columns, range(total))  # while it is open
        if tidy:
            log.close()
    found = read_log(folder)
    assert_rows(found.columns, range(total))
    assert found.damage == []
    newest = read_newest(folder, 10)
    assert newest["step"].tolist() == list(range(max(0, total - 10), total))


def test_more_rows_than_the_ring_holds(tmp_path):
    log = StepLog(tmp_path / "steps")
    for i in range(RING_ROWS + 1000):
        log.append(row(i))
    assert_rows(read_log(tmp_path / "steps").columns, range(RING_ROWS + 1000))


def test_it_is_closed_after_an_interruption_that_still_holds_its_memory(tmp_path, monkeypatch):
    """A second Ctrl-C while rows are sealed: its traceback has the array over the ring."""
    log = StepLog(tmp_path / "steps")
    for i in range(10):
        log.append(row(i))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("surefoot.record.log.np.arange", interrupted)
        with pytest.raises(KeyboardInterrupt) as held:
            log.seal()
    log.close()
    assert held.value.__traceback__ is not None
    found = read_log(tmp_path / "steps")
    assert_rows(found.columns, range(10))
    assert found.damage == []


WRITER = """
import sys
from pathlib import Path
from surefoot.record.columns import COLUMNS
from surefoot.record.log import StepLog
{row}
log = StepLog(Path(sys.argv[1]))
i = len(log)
while True:
    log.append(row(i))
    i += 1
    sys.stdout.buffer.write(i.to_bytes(8, "little"))
    sys.stdout.buffer.flush()
"""


def test_sigkill_loses_no_row(tmp_path):
    """Each row that the writer has told of is there, over ten kills at random instants."""
    rng = random.Random(0)
    code = WRITER.format(row=inspect.getsource(row))
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "steps"],
            stdout=subprocess.PIPE,
        )
        time.sleep(0)
        told = int.from_bytes(process.stdout.read(8), "little")
        for _ in range(rng.randint(0, 3000)):
            told = int.from_bytes(process.stdout.read(8), "little")
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        if len(rest) >= 8:
            told = int.from_bytes(rest[: len(rest) // 8 * 8][-8:], "little")
        found = read_log(tmp_path / "steps")
        assert len(found.columns["step"]) >= told
        assert_rows(found.columns, range(len(found.columns["step"])))
        assert found.damage == []


def written(path, rows=700):
    log = StepLog(path / "steps")
    for i in range(rows):
        log.append(row(i))
    log.close()
    return path / "steps" / "rows.bin"


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_is_found_and_the_rest_is_read(tmp_path, seed):
    file = written(tmp_path)
    (tmp_path / "steps" / "tail.bin").unlink()
    data, rng = bytearray(file.read_bytes()), random.Random(seed)
    begin = data.index(b"SFBK")
    at = rng.randrange(begin, len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    found = read_log(tmp_path / "steps")
    assert found.damage
    blocks = np.split(np.arange(700), [256, 512])
    lost = (at - begin) // (len(COLUMNS) * 8 * 256 + 20)
    kept = np.concatenate([b for i, b in enumerate(blocks) if i != lost])
    assert_rows(found.columns, kept)


@pytest.mark.parametrize("seed", range(30))
def test_a_torn_end_loses_only_its_block(tmp_path, seed):
    file = written(tmp_path)
    (tmp_path / "steps" / "tail.bin").unlink()
    data = file.read_bytes()
    cut = random.Random(seed).randrange(data.index(b"SFBK") + 1, len(data))
    file.write_bytes(data[:cut])
    found = read_log(tmp_path / "steps")
    whole = (cut - data.index(b"SFBK")) // (len(COLUMNS) * 8 * 256 + 20) * 256
    assert_rows(found.columns, range(whole))
    log = StepLog(tmp_path / "steps")  # goes on where it is sound
    log.append(row(whole))
    assert_rows(read_log(tmp_path / "steps").columns, range(whole + 1))


def test_a_damaged_header_is_an_error_that_says_so(tmp_path):
    file = written(tmp_path)
    file.write_bytes(b"something else\n")
    with pytest.raises(sf.StateError, match="not a readable step log"):
        read_log(tmp_path / "steps")


def test_a_damaged_column_name_costs_no_row(tmp_path):
    file = written(tmp_path)
    before = read_log(tmp_path / "steps").columns
    file.write_bytes(file.read_bytes().replace(b"grad_norm", b"grad_norm"[::-1], 1))
    after = read_log(tmp_path / "steps")
    assert [d[:2] for d in after.damage] == [("rows.bin", 0)]
    assert all(np.array_equal(before[name], after.columns[name], equal_nan=True) for name in before)
    StepLog(tmp_path / "steps").close()  # continuing mends it
    assert read_log(tmp_path / "steps").damage == []


def test_a_log_of_an_earlier_version_goes_on_with_the_columns_it_has(tmp_path):
    fewer = [c for c in COLUMNS if c.name != "cost"]
    keep = [i for i, c in enumerate(COLUMNS) if c.name != "cost"]
    log = StepLog(tmp_path / "steps", "abc", fewer)
    for i in range(300):
        log.append([row(i)[k] for k in keep])
    log.close()
    log = StepLog(tmp_path / "steps", "abc")
    for i in range(300, 700):
        log.append(row(i))
    found = read_log(tmp_path / "steps")  # while it is open
    log.close()
    assert found.damage == []
    assert list(found.columns) == [c.name for c in fewer]
    assert found.columns["time_s"].tolist() == [row(i)[-1] for i in range(700)]


def test_a_log_of_a_later_version_is_refused(tmp_path):
    StepLog(tmp_path / "steps", "abc", [*COLUMNS, Column("novel", "d", "")]).close()
    with pytest.raises(sf.StateError, match="columns that this version does not write"):
        StepLog(tmp_path / "steps", "abc")


def test_a_full_disk_costs_no_row(tmp_path, monkeypatch):
    log = StepLog(tmp_path / "steps")
    real, full = os.write, [True]

    def write(fd, data):
        if full[0]:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    for i in range(2000):
        log.append(row(i))
    assert_rows(read_log(tmp_path / "steps").columns, range(2000))
    full[0] = False
    log.append(row(2000))
    log.close()
    (tmp_path / "steps" / "tail.bin").unlink()
    assert_rows(read_log(tmp_path / "steps").columns, range(2001))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=8))
def test_the_lineage_is_what_the_weights_came_from(attempts):
    """Attempts that go back to a step at most as far as the run has got, and add some more."""
    steps, model = [], []
    for begin, length in attempts:
        begin = min(begin, len(model))
        model = model[:begin] + [(s, len(steps) + i) for i, s in enumerate(range(begin, begin + length))]
        steps += range(begin, begin + length)
    columns = {"step": np.array(steps), "at": np.arange(len(steps))}
    kept = lineage(columns)
    assert list(zip(kept["step"].tolist(), kept["at"].tolist(), strict=True)) == model


def test_events_survive_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path, attempt=1)
    events.add("started", step=0)
    events.add("validated", step=3, metrics={"loss": float("nan")})
    events.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "chec')
    events = Events(path, attempt=2)
    events.add("resumed", step=2)
    events.close()
    found, broken = read_events(path)
    assert [e["kind"] for e in found] == ["started", "validated", "resumed"]
    assert broken == [(3, len(whole))]
    assert [e["kind"] for e in event_lineage(found)] == ["started", "resumed"]
    for line in whole.splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN


def test_reading_needs_no_torch(fit):
    done = fit()
    code = (
        "import sys, surefoot as sf\n"
        f"run = sf.open_run({str(done.run_dir)!r})\n"
        "log = run.log(); run.summary(); run.plan.ids(3); run.events(); run.verify()\n"
        "assert type(log['loss']).__module__ == 'numpy' and len(log['loss']) == 16\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_say_what_happened(fit):
    done = fit(batch=sf.Batch(100, micro=30), schedule=sf.warmup(3) >> sf.cosine(), until="3ep")
    log = sf.open_run(done.run_dir).log()
    assert log["step"].tolist() == list(range(9))
    assert log["epoch"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert log["samples"].tolist() == [100, 200, 256, 356, 456, 512, 612, 712, 768]
    assert log["batch_samples"].tolist() == [100, 100, 56] * 3
    assert log["micro_batches"].tolist() == [4, 4, 2] * 3
    assert log["permitted"].all()
    np.testing.assert_allclose(log["lr"][:3], [0.1 / 3, 0.2 / 3, 0.1])
    assert (log["loss"] > 0).all()
    assert (log["grad_norm"] > 0).all()
    assert (log["update_ratio"][:-1] > 0).all()  # the last rate is 0
    assert (log["step_s"] >= log["data_wait_s"]).all()
    assert (np.diff(log["time_s"]) >= 0).all()


@pytest.mark.parametrize("to", ["csv", "jsonl", "parquet"])
def test_export(fit, tmp_path, to):
    done = fit()
    log = sf.open_run(done.run_dir).log()
    target = tmp_path / f"log.{to}"
    told = surefoot("export", done.run_dir, "--to", to, "--out", target)
    assert told.returncode == 0, told.stderr
    if to == "parquet":
        table = pytest.importorskip("pyarrow.parquet", reason="not run: needs pyarrow").read_table(target)
        rows = {name: table[name].to_numpy() for name in table.column_names}
    elif to == "csv":
        table = np.genfromtxt(target, delimiter=",", names=True)
        rows = {name: table[name] for name in table.dtype.names}
    else:
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        rows = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    assert list(rows) == list(log)
    for name, values in log.items():
        assert np.array_equal(rows[name], values), name
    if to == "csv":
        piped = surefoot("export", done.run_dir)
        assert piped.stdout.splitlines() == target.read_text().splitlines()
