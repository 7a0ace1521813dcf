"""The command line, as people and schedulers use it: real processes, exit codes, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, surefoot

GOOD = """
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from typing import Annotated, Literal
import surefoot as sf

def data(n=64):
    rng = np.random.default_rng(0)
    return sf.Arrays(rng.normal(size=(n, 4)).astype("float32"), rng.integers(0, 2, n))

def recipe(lr: Annotated[float, "how fast"] = 0.1, epochs: int = 2, kind: Literal["a", "b"] = "a",
           sizes: list[int] = [4, 5], name: str | None = None) -> sf.Recipe:
    \"\"\"A recipe for tests.\"\"\"
    return sf.Recipe(**{**dict(
        model=lambda: nn.Linear(4, 2), data=data(), objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=lr), batch=sf.Batch(16), until=f"{epochs}ep",
    ), **CHANGES})

CHANGES = {}
"""


def write(folder: Path, changes: str = "", code: str = GOOD) -> Path:
    file = folder / "my_recipe.py"
    file.write_text(textwrap.dedent(code) + (f"\nCHANGES = dict({changes})\n" if changes else ""))
    return file


def listing(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if "__pycache__" not in p.parts}


BAD_RECIPES = {
    "an empty dataset": ("data=data(0)", "data is empty"),
    "a loss that is a mean": (
        "objective=lambda m, d: F.cross_entropy(m(d[0]), d[1])",
        r"objective returned losses of shape () for a micro-batch of 16",
    ),
    "a loss of another shape": (
        "objective=lambda m, d: F.cross_entropy(m(d[0]), d[1], reduction='none')[:, None]",
        r"shape (16, 1)",
    ),
    "a loss that is no tensor": ("objective=lambda m, d: 1.0", "shape float"),
    "a loss without a gradient": (
        "objective=lambda m, d: torch.ones(len(d[1]), requires_grad=True)",
        "no parameter got a gradient",
    ),
    "a model instance": ("model=nn.Linear(4, 2)", "not a function that makes the model"),
    "a model that is none": ("model=lambda: 3", "model() made a int"),
    "a lazy model": ("model=lambda: nn.LazyLinear(2)", "parameters without a shape yet"),
    "a share of nothing": ("until='5%'", "until = '5%' cannot be met"),
    "seconds": ("until='5min'", "must not depend on the clock"),
    "no duration": ("until='many'", "is not a duration"),
    "zero": ("until=0", "must be above zero"),
    "a warm-up that is too long": ("schedule=sf.warmup(100) >> sf.cosine()", "the run has 8"),
    "a closure": ("optimizer=lambda g: torch.optim.LBFGS(g[0]['params'])", "needs a closure"),
    "a bad rate": ("optimizer=sf.SGD(lr=-1)", "refuses its options"),
    "no optimizer": ("optimizer=lambda g: 3", "built a int"),
    "a glob for nothing": ("groups=(sf.Group('nope.*'),)", "matches no parameter"),
    "a micro-batch above the batch": ("batch=sf.Batch(16, micro=32)", "is larger than batch.size"),
    "a tail that is unknown": ("batch=sf.Batch(16, tail='wag')", "batch.tail = 'wag' is unknown"),
    "nothing left by drop": ("batch=sf.Batch(100, tail='drop')", "leaves no batch"),
    "a precision": ("precision='fp8'", "precision = 'fp8' is unknown"),
    "a seed": ("seed=-1", "seed = -1"),
    "arrays of two lengths": ("data=sf.Arrays(np.ones((3, 4)), np.ones(4))", "different lengths"),
    "a source that is none": ("data=[1, 2, 3]", "Wrap arrays in Arrays"),
    "a source that lies": (
        "data=type('S', (), {'__len__': lambda s: 9, 'fetch': lambda s, i: (torch.ones(2, 4), 0)})()",
        "fetch of 9 ids returned a tensor of shape (2, 4)",
    ),
    "a metric of the wrong shape": (
        "validation=sf.Validation(data(), {'m': lambda m, d: torch.tensor(1.0)})",
        "metric 'm' returned ()",
    ),
    "a metric that nobody computes": (
        "validation=sf.Validation(data()), early_stopping=sf.EarlyStopping('acuracy')",
        "watches 'acuracy'",
    ),
    "stopping without validation": ("early_stopping=sf.EarlyStopping()", "needs a validation"),
    "an argument that is unknown": ("bacth=3", "unexpected keyword argument 'bacth'"),
    "something else": ("model=1/0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe_exits_2_with_nothing_written(tmp_path, name):
    changes, says = BAD_RECIPES[name]
    file = write(tmp_path, changes)
    before = listing(tmp_path)
    done = surefoot("train", file, "--out", tmp_path / "deep/er/run")
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.replace("\n", " ").replace("  ", " ") or says in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == before


BAD_USES = {
    "no such file": (["nope.py"], "there is no such file"),
    "a folder as file": (["full"], "full: that is no file"),
    "a section": (["my_recipe.py", "--set", "compute=5"], "Give one of its keys: compute.compile,"),
    "no such option": (["my_recipe.py", "lrr=1"], "Did you mean 'lr'?"),
    "no value": (["my_recipe.py", "lr"], "Write key=value"),
    "wrong type": (["my_recipe.py", "epochs=two"], "option epochs = 'two'"),
    "wrong choice": (["my_recipe.py", "kind=c"], "option kind = 'c'"),
    "unknown key": (["my_recipe.py", "--set", "compute.compil=on"], "Did you mean 'compute.compile'?"),
    "key without section": (["my_recipe.py", "--set", "workers=2"], "Did you mean 'data.workers'?"),
    "bad value": (["my_recipe.py", "--set", "data.workers=-1"], "data.workers = '-1'"),
    "bad cadence": (["my_recipe.py", "--set", "checkpoint.every=soon"], "not a duration"),
    "bad device": (["my_recipe.py", "--device", "toaster"], "device = 'toaster'"),
    "unknown flag": (["my_recipe.py", "--outt", "x"], "No such option"),
    "no file": ([], "Usage"),
    "a folder of something else": (["my_recipe.py", "--out", "full"], "is not empty and holds no run"),
    "a file as folder": (["my_recipe.py", "--out", "my_recipe.py"], "is a file"),
    "fresh without out": (["my_recipe.py", "--fresh"], "--fresh needs --out"),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_usage_exits_2_with_nothing_written(tmp_path, name):
    arguments, says = BAD_USES[name]
    write(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("dear")
    before = listing(tmp_path)
    done = surefoot("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr + done.stdout
    assert "fix:" in done.stderr or "Usage" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1", "has no function named recipe"),
        ("def recipe(lr=0.1): ...", "needs a type and a default"),
        ("def recipe(lr: float): ...", "needs a type and a default"),
        ("def recipe(): return 3", "returned a int"),
        ("import nonesuch", "ModuleNotFoundError"),
        ("def recipe(:", "SyntaxError"),
    ],
)
def test_a_bad_recipe_file(tmp_path, code, says):
    done = surefoot("train", write(tmp_path, code=code), cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["show", "verify", "export", "report"])
def test_commands_on_what_is_no_run(tmp_path, command):
    done = surefoot(command, tmp_path / "nothing")
    assert done.returncode == 2
    assert "holds no run" in done.stderr


def test_the_face_of_a_run(tmp_path):
    file, run = write(tmp_path), tmp_path / "run"
    done = surefoot("train", file, "lr=0.05", "epochs=3", "sizes=[1,2]", "name=x", "--out", run)
    assert done.returncode == 0, done.stderr
    assert "finished: 12 updates" in done.stdout
    assert "weights" in done.stderr  # the table of groups
    told = json.loads(surefoot("show", run, "--json").stdout)
    assert {"status", "step", "samples", "epoch", "metrics", "interventions", "digest", "ledger"} <= set(
        told
    )
    assert (told["status"], told["step"], told["samples"], told["epoch"]) == ("finished", 12, 192, 3)
    assert told["interventions"] == 0
    assert len(told["digest"]) == 64
    shown = surefoot("show", run, env={"COLUMNS": "80"})
    assert "finished" in shown.stdout
    assert told["digest"] in shown.stdout
    assert "\x1b" not in shown.stdout
    listed = surefoot("runs", tmp_path)
    assert "finished" in listed.stdout
    assert json.loads(surefoot("runs", tmp_path, "--json").stdout)[0]["digest"] == told["digest"]
    assert surefoot("verify", run).returncode == 0
    checkpoint = next((run / "checkpoints").iterdir()) / "model.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    checkpoint.write_bytes(data)
    found = surefoot("verify", run)
    assert found.returncode == 1
    assert "model.safetensors" in found.stderr


def test_help_lists_the_options_of_a_recipe(tmp_path):
    told = surefoot("train", write(tmp_path), "--help")
    assert told.returncode == 0
    for word in ("lr", "float", "0.1", "how fast", "epochs", "compute.compile", "checkpoint.every"):
        assert word in told.stdout
    assert surefoot("--version").stdout.startswith("surefoot 0.")
    assert surefoot("--help").returncode == 0


def test_operations_come_from_file_environment_and_flags_in_that_order(tmp_path):
    file = write(tmp_path)
    (tmp_path / "surefoot.toml").write_text(
        '[checkpoint]\nevery = 1\nkeep_last = 7\n[data]\nworkers = "x"\n'
    )
    bad = surefoot("train", file, "--out", tmp_path / "a")
    assert bad.returncode == 2
    assert "data.workers = 'x'" in bad.stderr
    (tmp_path / "surefoot.toml").write_text("[checkpoint\n")
    bad = surefoot("train", file, "--out", tmp_path / "a")
    assert bad.returncode == 2
    assert "surefoot.toml is not TOML" in bad.stderr
    assert "fix: Mend it" in bad.stderr
    (tmp_path / "surefoot.toml").write_text("[checkpoint]\nevery = 1\nkeep_last = 7\n")
    assert surefoot("train", file, "--out", tmp_path / "a").returncode == 0
    assert len(list((tmp_path / "a/checkpoints").iterdir())) == 7
    by_env = {"SUREFOOT_CHECKPOINT__KEEP_LAST": "4"}
    assert surefoot("train", file, "--out", tmp_path / "b", env=by_env).returncode == 0
    assert len(list((tmp_path / "b/checkpoints").iterdir())) == 4
    flags = ("--set", "checkpoint.keep_last=2", "--set", "checkpoint.every=1ep")
    assert surefoot("train", file, "--out", tmp_path / "c", *flags, env=by_env).returncode == 0
    assert [p.name.split("-")[1] for p in sorted((tmp_path / "c/checkpoints").iterdir())] == [
        "000000004", "000000008",
    ]  # fmt: skip
    wrong = surefoot("train", file, "--out", tmp_path / "d", env={"SUREFOOT_CHECKPOINT_KEEPLAST": "1"})
    assert wrong.returncode == 2
    assert "SUREFOOT_CHECKPOINT_KEEP_LAST" in wrong.stderr
    assert len({json.loads(surefoot("show", tmp_path / r, "--json").stdout)["digest"] for r in "abc"}) == 1


def test_a_run_that_diverges_exits_3(tmp_path):
    file = write(tmp_path, "optimizer=sf.SGD(lr=1e38), until='100ep'")
    done = surefoot("train", file, "--out", tmp_path / "run")
    assert done.returncode == 3
    assert "diverged after" in done.stdout
    told = json.loads(surefoot("show", tmp_path / "run", "--json").stdout)
    assert told["status"] == "diverged"
    assert told["interventions"] >= 4
    assert "0.5 of the rate" in told["reason"]


def test_a_changed_dataset_is_refused(tmp_path):
    assert surefoot("train", write(tmp_path), "--out", tmp_path / "run").returncode == 0
    changed = surefoot("train", write(tmp_path, "data=data(63)"), "--out", tmp_path / "run")
    assert changed.returncode == 2
    assert "plan.num_samples: 64 -> 63" in changed.stderr


def test_a_failure_within_the_run_exits_1_and_can_be_continued(tmp_path):
    trap = "objective=lambda m, d: eval(TRAP.read_text())"
    code = GOOD + (
        "\nimport itertools, os, pathlib, signal\nTRAP = pathlib.Path(__file__).with_name('trap')\n"
        "COUNT = itertools.count()\nLOSS = sf.supervised(F.cross_entropy)\n"
    )
    file, run = write(tmp_path, trap, code), tmp_path / "run"
    (tmp_path / "trap").write_text("1 / 0 if next(COUNT) > 5 else LOSS(m, d)")
    failed = surefoot("train", file, "--out", run, "--set", "checkpoint.every=2")
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr
    told = json.loads(surefoot("show", run, "--json").stdout)
    assert (told["status"], told["step"]) == ("failed", 6)
    assert "ZeroDivisionError" in told["reason"]

    (tmp_path / "trap").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    assert surefoot("train", file, "--out", run).returncode == -signal.SIGKILL
    told = json.loads(surefoot("show", run, "--json").stdout)
    assert (told["status"], told["reason"], told["attempts"]) == ("failed", None, 2)

    (tmp_path / "trap").write_text("LOSS(m, d)")
    assert surefoot("train", file, "--out", run).returncode == 0
    assert json.loads(surefoot("show", run, "--json").stdout)["step"] == 8


def test_output_that_cannot_be_made(tmp_path):
    if os.geteuid() == 0:
        target = Path("/proc/surefoot/run")
    else:
        target = Path("/surefoot-run")
    done = surefoot("train", write(tmp_path), "--out", target)
    assert done.returncode == 2
    assert "cannot be written to" in done.stderr


def test_examples_are_documented():
    for example in (ROOT / "examples").glob("*.py"):
        assert "surefoot train examples/" in example.read_text()


def test_a_recipe_file_that_breaks_is_told_with_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("settings = {}\nrate = settings['rate']\n")
    done = surefoot("train", "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine.py: loading it raised KeyError in line 2: 'rate'" in done.stderr
    assert "rate = settings['rate']" in done.stderr


def test_an_interrupt_within_the_imports_leaves_no_traceback():
    code = """
import builtins, os, signal
load = builtins.__import__
def interrupted(name, *of, **more):
    if name == "typer":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *of, **more)
from surefoot.__main__ import main
builtins.__import__ = interrupted
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
