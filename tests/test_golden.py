"""A run that an earlier version wrote stays readable, and one that a later version wrote is refused."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, surefoot

import surefoot as sf
from surefoot.checkpoint.store import DirectoryStore
from surefoot.record.folder import _signed

GOLDEN = ROOT / "tests/golden"
RUNS = sorted(GOLDEN.glob("run-*"))


@pytest.fixture(params=RUNS, ids=lambda path: path.name)
def run(request, tmp_path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def test_it_is_read(run):
    view = sf.open_run(run)
    assert view.verify() == []
    told = view.summary()
    assert (told["status"], told["step"], told["epoch"]) == ("finished", 12, 2.4)
    assert told["digest"] == "145fda675beadc2dea00c99376821303af21641bfbdb12344691b08618d1659b"
    assert view.log()["step"].tolist() == list(range(12))
    assert set(told["metrics"]) == {"train_loss", "loss"}
    assert view.plan.ids(0).shape == (8,)
    assert surefoot("report", run).returncode == 0


def test_its_checkpoints_are_loaded(run):
    view = sf.open_run(run)
    store = DirectoryStore(run / "checkpoints", run=view.identity["id"])
    states = [store.load(checkpoint) for checkpoint in view.checkpoints()]
    assert [state.facts["counters"]["step"] for state in states] == [5, 10, 12]
    assert {"0.weight", "1.running_mean"} <= set(states[-1].model)
    assert set(states[-1].frozen) == {"0.bias"}


def test_it_is_continued(run):
    ended = surefoot("train", GOLDEN / "recipe.py", "--out", run)
    assert ended.returncode == 0, ended.stderr
    assert "has ended already: finished after 12 updates" in ended.stdout
    shutil.rmtree(run / "checkpoints/000003-000000012")
    done = surefoot("train", GOLDEN / "recipe.py", "--out", run)
    assert done.returncode == 0, done.stderr
    assert "continues at step 10" in done.stderr
    assert sf.open_run(run).summary()["step"] == 12


def test_a_later_format_is_refused(run):
    identity = {**json.loads((run / "run.json").read_text()), "schema": 99}
    del identity["self"]
    (run / "run.json").write_bytes(_signed(identity))
    for command in (("show",), ("verify",), ("train", GOLDEN / "recipe.py", "--out")):
        refused = surefoot(*command, run)
        assert refused.returncode == 1
        assert "has a format that this version does not read" in refused.stderr
        assert "Use the version of surefoot that wrote it" in refused.stderr
