"""What people look at: the report in a real browser, the progress line, the examples."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, blobs, recipe, surefoot
from rich.console import Console

import surefoot as sf
from surefoot.export.progress import alarms, describe, duration_text, progress
from surefoot.export.report import thin
from surefoot.record.incidents import of_event

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A run with refused updates and validation, and another."""
    folder = tmp_path_factory.mktemp("runs")
    x, y = blobs(256)
    x[37] = np.nan
    validation = sf.Validation(
        sf.Arrays(*blobs(64, seed=1)),
        {"accuracy": lambda m, d: (m(d[0]).argmax(1) == d[1]).float()},
        every="1ep",
    )
    changed = {"validation": validation, "schedule": sf.warmup(10) >> sf.cosine(to=0.01), "until": "6ep"}
    sf.fit(recipe(data=sf.Arrays(x, y), **changed), out=folder / "bad <sample>")
    sf.fit(recipe(**changed, optimizer=sf.AdamW(lr=0.01)), out=folder / "other")
    return folder


def browse(page, tmp_path, *flags):
    """Loads a page in headless Chromium without a network; its DOM after scripts have run."""
    if CHROMIUM is None:
        pytest.skip("not run: needs chromium")
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-quic",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1700",
            "--virtual-time-budget=8000", *flags, page.resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


def test_the_report_shows_its_plots_in_a_browser(two_runs, tmp_path):
    page = tmp_path / "report.html"
    told = surefoot("report", two_runs / "bad <sample>", two_runs / "other", "--out", page)
    assert told.returncode == 0, told.stderr
    text = page.read_text()
    script = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']?https?:""", script), "the page must not load anything"
    dom = browse(page, tmp_path, "--dump-dom")
    assert dom.count('class="main-svg"') >= 6 * 2
    for title in ("Training loss", "Validation", "Learning rate", "Gradient norm", "Time per step"):
        assert f">{title}" in dom
    assert len(re.findall(r'class="js-line"', dom)) >= 12
    assert "repeat(auto-fill" in text  # auto-fit draws the first plot, while it is alone, across the page
    assert "bad &lt;sample&gt;" in dom
    assert "loss is not finite" in dom  # the events of refused updates
    browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_a_report_of_a_run_without_a_step(two_runs, tmp_path):
    run = tmp_path / "killed"
    shutil.copytree(two_runs / "other", run)
    shutil.rmtree(run / "steps")
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").write_text("")
    assert surefoot("report", run, "--out", tmp_path / "r.html").returncode == 0
    told = json.loads(surefoot("show", run, "--json").stdout)
    assert (told["status"], told["step"], told["digest"]) == ("failed", 0, None)
    assert surefoot("show", run).returncode == 0
    assert surefoot("runs", tmp_path).returncode == 0


def test_thinning_keeps_every_spike():
    x, y = np.arange(100_000), np.zeros(100_000)
    y[[777, 50_001, 99_999]] = 5.0, -3.0, 9.0
    tx, ty = thin(x, y)
    assert len(tx) <= 3000
    assert {777, 50_001, 99_999} <= set(tx.tolist())
    assert sorted(tx.tolist()) == tx.tolist()
    assert (ty[np.isin(tx, [777])] == 5).all()


def rows(n, **changes):
    columns = {
        "step": np.arange(n), "epoch": np.arange(n) // 4, "loss": np.full(n, 0.5), "lr": np.full(n, 0.1),
        "step_s": np.full(n, 0.01), "batch_samples": np.full(n, 32), "time_s": np.arange(n) * 0.02,
        "permitted": np.ones(n, bool),
    }  # fmt: skip
    return {**columns, **changes}


def test_the_progress_line_says_what_there_is_to_say():
    line = describe(rows(100), {"accuracy": 0.75}, 200).plain
    assert line == (
        "step 100/200 · 50 % · epoch 25 · loss 0.5 · val accuracy 0.75 · lr 0.1 · "
        "3,200 samples/s · 0:02 left"
    )
    refused = np.ones(100, bool)
    refused[3] = False
    assert "1 of the last 100 refused" in describe(rows(100, permitted=refused), {}, 200).plain
    assert "left" not in describe(rows(100), {}, 100).plain
    assert "first step" in describe(rows(0), {}, 10).plain
    assert (duration_text(75), duration_text(3723)) == ("1:15", "1:02:03")


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [
        (["started"], False),
        (["healing"], True),
        (["healing", "worker_replaced"], True),
        (["healing", "rolled_back"], False),
        (["healing", "alarm"], False),
        (["healing", "alarm", "healing"], True),
        (["healing", "resumed"], False),
    ],
)
def test_that_an_alarm_is_looked_into_is_shown_while_it_is(kinds, shown):
    told = alarms([{"kind": kind, "reason": "the loss is high"} for kind in kinds])
    assert told == (["LOOKING INTO the loss is high: earlier steps are taken again"] if shown else [])


@pytest.mark.parametrize(
    ("facts", "done"),
    [
        (
            {"tried": ["0.5 of the rate"]},
            "none of these helped, tried on the same batches: 0.5 of the rate",
        ),
        ({"untried": "the guard only watches"}, "the guard only watches"),
        ({}, "nothing that could be tried helps, or the guard only watches"),  # of an earlier version
    ],
)
def test_what_was_done_about_an_alarm(facts, done):
    event = {
        "kind": "alarm",
        "detector": "D6",
        "reason": "r",
        "step": 192,
        "time": 0.0,
        "attempt": 1,
        "n": 1,
    }
    assert of_event(event | facts).action == f"none: {done}"


def test_plain_lines_where_there_is_no_terminal(two_runs):
    with (
        (two_runs / "lines").open("w") as file,
        progress(two_runs / "other", on=True, console=Console(file=file, width=200)),
    ):
        time.sleep(2.4)
    lines = (two_runs / "lines").read_text().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("step 48/48 · 100 % · epoch 6 · loss ") for line in lines)


@pytest.mark.parametrize("colour", [True, False])
def test_a_line_drawn_anew_on_a_terminal(tmp_path, colour):
    """A real terminal: the line appears several times while a run goes on; NO_COLOR is honoured."""
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    if not colour:
        environment["NO_COLOR"] = "1"
    command = [
        "train",
        "tests/recipes/everything.py",
        "pause_s=0.005",
        "epochs=3",
        "--out",
        str(tmp_path / "r"),
    ]
    seen = bytearray()

    def read(fd):
        data = os.read(fd, 4096)
        seen.extend(data)
        return data

    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "surefoot", *command], environment)
    try:
        while True:
            read(fd)
    except OSError:  # the terminal is closed when the process ends
        pass
    _, status = os.waitpid(pid, 0)
    text = seen.decode(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert len(set(re.findall(r"\d+/36", text))) >= 4
    assert "finished: 36 updates" in text
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", text)) == colour


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (("digits.py", "epochs=15"), lambda m: m["accuracy"] > 0.96),
        (("diabetes.py",), lambda m: m["distance"] < 1e-12),
        (("diabetes.py", "batch=1", "updates=4000", "lr=0.01"), lambda m: m["distance"] < 0.15),
        (
            ("stdlib_gpt.py", "updates=120", "layers=2", "width=64", "files=20", "context=64", "lr=0.005"),
            lambda m: m["bits_per_character"] < 4.3,
        ),
        (
            ("stdlib_gpt.py", "updates=4", "layers=1", "width=32", "files=4", "precision=bf16"),
            lambda m: m["bits_per_character"] < 7,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_examples(tmp_path, arguments, check):
    pytest.importorskip("sklearn", reason="not run: needs scikit-learn")
    file, *settings = arguments
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = surefoot("train", ROOT / "examples" / file, *settings, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(surefoot("show", tmp_path / "run", "--json").stdout)
    assert told["status"] == "finished"
    assert check(told["metrics"]), told["metrics"]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20  # others have the rest
    assert surefoot("verify", tmp_path / "run").returncode == 0
