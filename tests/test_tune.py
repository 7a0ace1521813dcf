"""Measuring how to compute: all is tried, what is best is written, and nothing is learned otherwise."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, blobs, flat, recipe, surefoot
from torch import nn

import surefoot as sf
from surefoot.choice import Kept, Question, choose
from surefoot.errors import OperationsError
from surefoot.operations import Operations
from surefoot.tune.compute import Tried, tune_compute
from surefoot.tune.settings import write_settings


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(),
        nn.Linear(128, 3),
    )  # fmt: skip


def images(**changes):
    return recipe(model=conv, data=sf.Arrays(*blobs(features=64)), **changes)


def keys(tuned):
    return [set(one.settings) for one in tuned.tried]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_alternatives_are_tried_beside_the_best_so_far(monkeypatch):
    monkeypatch.setattr("surefoot.tune.compute._LEAST_TURN_S", 0.01)
    before, told = torch.get_num_threads(), list[str]()
    found = Operations(compute={"threads": 1, "layout": "channels_last", "compile": "on"})  # earlier
    try:
        torch.set_num_threads(2)
        tuned = tune_compute(images(until=10**9), found, say=told.append)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    tried = [one.settings for one in tuned.tried]
    assert tried[0] == {
        "compute.compile": "off", "compute.threads": 2, "compute.layout": "contiguous",
    }  # fmt: skip
    assert any(one["compute.layout"] == "channels_last" for one in tried)
    assert any(one["compute.threads"] == 1 for one in tried)
    assert {one.compiled for one in tuned.tried if one.settings["compute.compile"] == "on"} == {"step"}
    assert all(tried.count(one) == 1 for one in tried)
    assert len(told) == len(tried)
    assert tuned.best in tuned.tried
    assert all(one.step_s > 0 and not one.why_not for one in tuned.tried)
    best = tuned.tried[0]
    for one in tuned.tried[1:]:
        best = one if one.beside < 0.97 else best
    assert tuned.best is best


def test_the_fastest_is_what_was_clearly_faster_than_the_best_before_it(monkeypatch):
    seen = []

    def measured(recipe, operations, settings, best, total):
        seen.append((settings, best))
        return Tried(settings, step_s=1.0, prepare_s=0.0, beside=[1.0, 0.98, 0.9, 0.96][len(seen) - 1])

    before = torch.get_num_threads()
    monkeypatch.setattr("surefoot.tune.compute._beside", measured)
    try:
        torch.set_num_threads(2)
        tuned = tune_compute(recipe(), Operations())
    finally:
        torch.set_num_threads(before)
    first, _, third, fourth = tuned.tried
    assert [best for _, best in seen] == [None, first, first, third]
    assert tuned.best is fourth


def test_what_is_held_is_not_varied(monkeypatch):
    monkeypatch.setattr("surefoot.tune.compute._LEAST_TURN_S", 0.01)
    asked = Operations(compute={"threads": 1, "compile": "off"})
    tuned = tune_compute(images(), asked, held=["compute.threads", "compute.compile"])
    assert [one.settings for one in tuned.tried] == [
        {"compute.layout": "contiguous"}, {"compute.layout": "channels_last"},
    ]  # fmt: skip


class Rolls(nn.Linear):
    """Draws by Python's generator, so that it is not compiled."""

    def forward(self, x):
        return super().forward(x) * (0.9 + 0.2 * random.random())


def test_an_alternative_that_compiles_nothing_is_told_and_never_the_fastest(monkeypatch):
    monkeypatch.setattr("surefoot.tune.compute._LEAST_TURN_S", 0.01)
    tuned = tune_compute(recipe(model=lambda: Rolls(8, 3), until=10**9), Operations())
    on = [one for one in tuned.tried if one.settings["compute.compile"] == "on"]
    assert on
    assert all("not compiled: the model draws from" in one.why_not for one in on)
    assert tuned.best.settings["compute.compile"] == "off"


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = map(torch.as_tensor, blobs())

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_workers_are_tried_where_they_matter_and_what_fails_is_told(monkeypatch):
    monkeypatch.setattr("surefoot.tune.compute._LEAST_TURN_S", 0.01)
    with pytest.raises(sf.RecipeError, match="the first step failed"):
        tune_compute(recipe(model=lambda: nn.Linear(7, 3)), Operations())
    tuned = tune_compute(recipe(data=sf.Dataset(Pairs()), until=5), Operations(compute={"threads": 1}))
    assert {one.settings["data.workers"] for one in tuned.tried} == {0, 1, 2}
    assert tuned.best.settings["compute.compile"] == "off"  # five updates do not pay for a compiler


def test_a_file_keeps_what_else_it_holds(tmp_path):
    path = tmp_path / "surefoot.toml"
    path.write_text(
        '# ours\n[compute]\nthreads = 4 # of eight\ncompile = "off"\n\n[checkpoint]\nevery = "5min"\n'
    )
    write_settings({"compute.compile": "on", "data.workers": 2}, path)
    text = path.read_text()
    assert "# ours" in text
    assert "threads = 4 # of eight" in text
    assert 'every = "5min"' in text
    assert sf.Operations().compute.compile == "auto"
    from surefoot.operations import gather

    found = gather(path, {}, {})
    assert (found.compute.compile, found.compute.threads, found.data.workers) == ("on", 4, 2)
    path.write_bytes(b"# ours\r\n[compute]\r\nthreads = 4\r\n")
    write_settings({"compute.threads": 2}, path)
    assert path.read_bytes() == b"# ours\r\n[compute]\r\nthreads = 2\r\n"
    linked = tmp_path / "link" / "surefoot.toml"
    linked.parent.mkdir()
    linked.symlink_to(path)
    write_settings({"compute.threads": 3}, linked)
    assert linked.is_symlink()
    assert b"threads = 3" in path.read_bytes()
    path.write_text("[compute")
    with pytest.raises(OperationsError, match="cannot be written"):
        write_settings({"compute.compile": "on"}, path)
    assert path.read_text() == "[compute"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "surefoot.toml"]


@pytest.mark.parametrize("blocked", ["folder", "nowhere"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, blocked):
    file = tmp_path / "digits.py"
    file.write_text((ROOT / "examples/digits.py").read_text())
    path = tmp_path / "surefoot.toml"
    path.mkdir() if blocked == "folder" else path.symlink_to(tmp_path / "nowhere" / "x.toml")
    done = surefoot("tune", "compute", file)
    assert done.returncode == 2
    assert "surefoot.toml cannot be written" in done.stderr
    assert "only measure: --dry-run" in done.stderr
    assert "ms/update" not in done.stdout


def test_on_the_command_line(tmp_path):
    file = tmp_path / "digits.py"
    file.write_text((ROOT / "examples/digits.py").read_text())
    done = surefoot("tune", "compute", file, "epochs=1", "hidden=16")
    assert done.returncode == 0, done.stderr
    assert "ms/update" in done.stdout
    assert "fastest, written to" in done.stdout
    assert "[compute]" in (tmp_path / "surefoot.toml").read_text()
    again = surefoot("tune", "compute", file, "epochs=1", "--set", "compute.threads=1", "--dry-run")
    assert again.returncode == 0, again.stderr
    assert "not varied, since it is set: compute.threads" in again.stdout
    assert "threads 1" not in again.stdout
    trained = surefoot("train", file, "epochs=1", "hidden=16", "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    wrong = surefoot("tune", "compute", file, "epoch=1", "--dry-run")
    assert wrong.returncode == 2
    assert "epochs" in wrong.stderr


def test_layout_changes_nothing_but_rounding_and_is_kept_to_the_bit(tmp_path):
    last = Operations(compute={"layout": "channels_last"}, checkpoint={"every": 3})
    plain = sf.fit(images(), out=tmp_path / "plain")
    whole = sf.fit(images(), out=tmp_path / "whole", operations=last)
    torch.testing.assert_close(flat(whole.model), flat(plain.model), rtol=1e-4, atol=1e-5)
    assert whole.model[1].weight.is_contiguous(memory_format=torch.channels_last)
    for outcome in sf.steps(images(), out=tmp_path / "parts", operations=last):
        if outcome.step == 7:
            break
    parts = sf.fit(images(), out=tmp_path / "parts", operations=last)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert sf.replay_step(images(), tmp_path / "whole", step=9).differences == []
    assert math.isfinite(F.mse_loss(flat(parts.model), flat(plain.model)).item())


@pytest.mark.parametrize(
    ("asked", "kept", "total", "allocated", "found"),
    [
        ("auto", None, 999, 0.0, ("", "not captured: under 1,000 updates it does not pay")),
        ("auto", None, 1000, 0.39, ("captured", "captured: the step is one CUDA graph")),
        ("auto", None, 1000, 0.41, ("", "not captured: a step takes more than 40% of the GPU's memory")),
        ("auto", "captured", 10, 0.9, ("captured", "captured: the step is one CUDA graph")),
        ("on", None, 10, 0.9, ("captured", "captured: the step is one CUDA graph")),
        ("auto", "", 1000, 0.0, ("", "")),
        ("off", None, 1000, 0.0, ("", "")),
    ],
)
def test_the_rule_by_which_steps_are_captured(monkeypatch, asked, kept, total, allocated, found):
    trial = SimpleNamespace(parts=SimpleNamespace(device=torch.device("cuda", 0)), total=total)
    gpu = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr("surefoot.choice.captured_step", lambda trial: ("graph", ""))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 * allocated)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    choice = choose(Question(asked, None, None if kept is None else Kept(kept, 2), trial))
    assert choice.compiled == found[0]
    assert choice.reason.startswith(found[1])
    assert (choice.graph is not None) == bool(found[0])


def test_what_cannot_be_captured_is_eager_by_the_rule(monkeypatch):
    trial = SimpleNamespace(parts=SimpleNamespace(device=torch.device("cuda", 0)), total=10_000)
    monkeypatch.setattr("surefoot.choice.captured_step", lambda trial: (None, "it waits"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    choice = choose(Question("auto", None, None, trial))
    assert (choice.compiled, choice.reason, choice.graph) == ("", "not captured: it waits", None)
