"""Game days: each fault happens, is survived, and the report says so truly."""

import json
import shutil
from contextlib import closing

import pytest
import torch
from conftest import ROOT, blobs, recipe, surefoot
from test_replay import tree
from torch.utils.data import TensorDataset

import surefoot as sf
from surefoot.build import build
from surefoot.launch.chaos import _apart
from surefoot.launch.faults import FAULTS, inject
from surefoot.record.folder import RunFolder

pytestmark = pytest.mark.timeout(600)
RECIPE = ROOT / "tests/recipes/calm.py"
EVERYTHING = ROOT / "tests/recipes/everything.py"


def game_day(out, *arguments):
    done = surefoot("chaos", RECIPE, *arguments, "--out", out, "--json", timeout=600)
    assert done.stdout, done.stderr
    return {one["fault"]: one for one in json.loads(done.stdout)}, done.returncode


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """All faults on one recipe: what the command reports, and where the runs lie."""
    out = tmp_path_factory.mktemp("chaos") / "day"
    report, code = game_day(out)
    return out, report, code


def test_a_stalled_worker(tmp_path):
    workers = ["--set", "data.workers=2", "--set", "data.timeout=3s"]
    report, code = game_day(tmp_path / "day", "--fault", "stalled-worker", *workers)
    assert report["stalled-worker"]["survived"] is True, report["stalled-worker"]["why"]
    assert report["stalled-worker"]["same_bits"]
    assert code == 0
    run = sf.open_run(tmp_path / "day/stalled-worker")
    assert "worker_replaced" in {e["kind"] for e in run.events()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"stalled-worker"}))
def test_every_fault_is_survived(day, name):
    out, report, _ = day
    played = report[name]
    assert played["survived"] is True, played["why"]
    view = sf.open_run(out / name)
    assert played["status"] == view.status == "finished"
    assert view.verify() == []
    assert played["same_bits"] == (
        view.summary()["digest"] == sf.open_run(out / "undisturbed").summary()["digest"]
    )
    if FAULTS[name].exact:
        assert played["same_bits"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nan-samples", "skipped"),
        ("huge-samples", "skipped"),
        ("corrupt-block", "skipped"),
        ("rate-x100", "rolled_back"),
        ("bit-flip", "skipped"),
        ("momentum", "skipped"),
        ("overflow", "skipped"),
        ("kill", "resumed"),
        ("full-disk", "checkpoint_failed"),
        ("lost-checkpoint", "resumed"),
        ("flipped-checkpoint", "checkpoint_rejected"),
    ],
)
def test_it_really_happened(day, name, kind):
    out, _, _ = day
    kinds = {e["kind"] for e in sf.open_run(out / name).events(all_events=True)}
    if name == "bit-flip":  # the state is looked at every 200 steps: it may be noticed before a step is
        assert kinds & {"skipped", "rolled_back"}
        return
    assert kind in kinds
    assert kind in {"resumed"} or kind not in {
        e["kind"] for e in sf.open_run(out / "undisturbed").events(all_events=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "until"),
    [("nan-samples", 80), ("huge-samples", 80), ("corrupt-block", 45), ("label-noise", 80)],
)
def test_data_are_spoilt_from_the_step_on_and_not_in_earlier_epochs(name, until, workers, tmp_path):
    data = [torch.from_numpy(a) for a in blobs()]  # 8 batches are an epoch
    source = sf.Dataset(TensorDataset(*data)) if workers else sf.Arrays(*data)
    operations = sf.Operations(data={"workers": workers})
    built = build(recipe(data=source, until=80), RunFolder(tmp_path / "run"), operations)
    right = [built.run.feed.at(step) for step in range(80)]
    inject(name, built.run, 40)
    with closing(built.run.feed.batches(0, 80)) as batches:
        found = [bytes_of(a) != bytes_of(b) for a, b in zip(batches, right, strict=True)]
    built.run.record.discard()
    assert not any(found[:40] + found[until:])
    often = 10 if "samples" in name else until - 40  # five samples come five times each
    assert found[40]
    assert sum(found[40:]) >= often


def bytes_of(batch):
    return [leaf.numpy().tobytes() for leaf in batch.data]


def test_noisy_labels_and_a_slow_disk_happened(day):
    out, _report, _ = day
    calm, noisy = (sf.open_run(out / name).log()["loss"] for name in ("undisturbed", "label-noise"))
    at = len(calm) // 2
    assert (calm[:at] == noisy[:at]).all()
    assert noisy[at : at + 40].mean() > 1.5 * calm[at : at + 40].mean()
    slow = [e["seconds"] for e in sf.open_run(out / "slow-disk").events() if e["kind"] == "checkpointed"]
    assert max(slow) > 1


def test_the_exit_code_tells_whether_all_was_survived(day):
    assert day[2] == 0


def test_a_fault_that_is_not_survived_is_told(tmp_path):
    done = surefoot(
        "chaos",
        RECIPE,
        "guard=off",
        "--fault",
        "bit-flip",
        "--out",
        tmp_path / "day",
        "--set",
        "data.workers=0",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no" in done.stdout
    assert "diverged" in done.stdout or "failed" in done.stdout


def test_a_copy_is_gone_on_with_and_the_original_untouched(tmp_path):
    run = tmp_path / "run"
    first = surefoot("train", RECIPE, "--out", run, "--set", "budget.updates=120")
    assert first.returncode == 4
    before = tree(run)
    done = surefoot(
        "chaos",
        RECIPE,
        "--run",
        run,
        "--fault",
        "kill",
        "--fault",
        "nan-samples",
        "--out",
        tmp_path / "day",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert tree(run) == before
    assert sf.open_run(tmp_path / "day/kill").summary()["attempts"] >= 3
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([RECIPE, "--fault", "bitflip"], "bit-flip"),
        (["nowhere.py"], "no such file"),
        ([RECIPE, "speed=3"], "speed"),
        ([RECIPE, "--at", "100000", "--fault", "kill"], "--at"),
        ([RECIPE, "--run", "nowhere", "--fault", "kill"], "holds no run"),
    ],
)
def test_bad_requests(tmp_path, arguments, says):
    done = surefoot("chaos", *arguments, "--out", tmp_path / "day")
    assert done.returncode == 2, done.stdout
    assert says in done.stderr


def test_a_recipe_that_cannot_be_trained_is_told_as_train_tells_it(tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "day"
    file.write_text(
        "import surefoot as sf, torch\n"
        "def recipe() -> sf.Recipe:\n"
        "    return sf.Recipe(model=lambda: torch.nn.Linear(1, 1), data=[1], objective=print,\n"
        "                     optimizer=sf.SGD(lr=0.1), batch=sf.Batch(1), until=9)\n"
    )
    done = surefoot("chaos", file, "--fault", "kill", "--out", out)
    assert done.returncode == 2
    assert "exit code 2: data is a list, not a source." in done.stderr
    assert "fix: Wrap arrays" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_what_a_recipe_cannot_have_is_not_run(day, tmp_path):
    out, report, _ = day
    assert report["stalled-worker"]["survived"] is None
    assert "needs processes that read data" in report["stalled-worker"]["why"]
    again = surefoot("chaos", RECIPE, "--fault", "kill", "--out", out)
    assert again.returncode == 2
    assert "not empty" in again.stderr


@pytest.mark.parametrize(
    ("now", "then", "fine"),
    [
        ({"accuracy": 0.9, "loss": 9.0}, {"accuracy": 0.91, "loss": 0.1}, True),
        ({"accuracy": 0.8}, {"accuracy": 0.9}, False),
        ({"accuracy": 0.95}, {"accuracy": 0.9}, True),
        ({"mse": 9e9, "loss": 0.1}, {"mse": 0.1, "loss": 0.1}, False),
        ({"perplexity": float("inf")}, {"perplexity": 3.0}, False),
        ({"loss": 0.001, "train_loss": 1.0}, {"loss": 0.0001, "train_loss": 0.1}, False),
        ({"loss": 0.05}, {"loss": 0.1}, True),
        ({"mine": 1.1}, {"mine": 1.0}, False),
        ({"distance": 7.4e-16}, {"distance": 7.1e-16}, True),
        ({}, {"accuracy": 0.9}, False),
        ({"train_loss": 1.0}, {"train_loss": 0.5}, True),
    ],
)
def test_how_the_ends_are_compared(now, then, fine):
    assert (_apart(now, then) == "") == fine


def test_a_copy_within_the_original_is_refused(tmp_path):
    surefoot("train", RECIPE, "--out", tmp_path / "run", "--set", "budget.updates=100")
    before = tree(tmp_path / "run")
    done = surefoot(
        "chaos", RECIPE, "--run", tmp_path / "run", "--out", tmp_path / "run/sub", "--fault", "kill"
    )
    assert done.returncode == 2
    assert "lies within" in done.stderr
    assert tree(tmp_path / "run") == before
