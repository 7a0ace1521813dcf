"""How many threads the kernels of a compiled step have: a rule, kept by the run, and undone after it."""

import pytest
import torch
from conftest import blobs, recipe
from torch import nn

import surefoot as sf
from surefoot.build import build
from surefoot.errors import OperationsError, SurefootError
from surefoot.operations import Operations
from surefoot.record.events import read_events
from surefoot.record.folder import RunFolder

FEATURES = 512


def large():
    return nn.Linear(FEATURES, 128)  # of 32 rows: 2 * 32 * 512 * 128 operations


def not_so_large():
    return nn.Linear(FEATURES, 64)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def ops(compile="on", **more):
    return Operations(compute={"compile": compile, **more}, checkpoint={"every": 4}, progress="off")


def environment(path):
    return RunFolder(path).identity()["environment"]


def events(path, kind):
    return [event for event in read_events(RunFolder(path).events_file)[0] if event["kind"] == kind]


def wide(model, **changes):
    return recipe(model=model, data=sf.Arrays(*blobs(features=FEATURES)), until=12, **changes)


@pytest.mark.parametrize(
    ("model", "operations", "threads"),
    [
        (not_so_large, ops(), 1),
        (large, ops(), 2),
        (not_so_large, ops(threads=2), 2),
        (not_so_large, ops("off"), 2),
    ],
    ids=["short", "long", "asked for", "eager"],
)
def test_kernels_that_are_short_have_one_thread_in_a_compiled_step(tmp_path, model, operations, threads):
    seen = []
    for outcome in sf.steps(wide(model), out=tmp_path / "run", operations=operations):
        seen.append(torch.get_num_threads())
        if outcome.step == 5:
            break
    assert seen == [threads] * 6
    assert environment(tmp_path / "run")["threads"] == threads


def test_the_rule_is_that_of_a_run_that_nobody_decided_on(tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.choice.ENOUGH_UPDATES", 12)
    built = build(wide(not_so_large), RunFolder(tmp_path / "run"), Operations())
    assert any("for one thread: its kernels are short" in note for note in built.notes), built.notes
    assert environment(tmp_path / "run")["compiled"] == "step"
    assert built.run is not None
    built.run.record.discard()
    torch.set_num_threads(built.run.threads_before)


@pytest.mark.parametrize("first", [{}, {"threads": 2}, {"threads": 1}], ids=["rule", "two", "one"])
@pytest.mark.parametrize("here", [1, 2])
def test_a_run_goes_on_with_the_threads_it_had(tmp_path, monkeypatch, first, here):
    """Also one of a version that had no such rule. ``auto`` is what a run is continued with."""
    monkeypatch.setattr("surefoot.choice.ENOUGH_UPDATES", 12)
    whole = sf.fit(wide(not_so_large), out=tmp_path / "whole", operations=ops("auto", **first))
    for outcome in sf.steps(wide(not_so_large), out=tmp_path / "parts", operations=ops("auto", **first)):
        if outcome.step == 6:
            break
    begun_with = environment(tmp_path / "parts")["threads"]
    assert begun_with == (2 if first.get("threads") == 2 else 1)
    torch.set_num_threads(here)
    parts = sf.fit(wide(not_so_large), out=tmp_path / "parts", operations=ops("auto"))
    torch.set_num_threads(2)
    (resumed,) = events(tmp_path / "parts", "resumed")
    if begun_with == 2 and here == 1:  # no more than there are
        assert resumed["environment_changed"] == {"threads": [2, 1]}
    else:
        assert not resumed.get("environment_changed")
        assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert sf.replay_step(wide(not_so_large), tmp_path / "whole", step=9).differences == []


class Unbuildable(nn.Module):
    def __init__(self):
        raise ValueError("no")


def test_threads_are_the_callers_again_when_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.choice.compiled_step", lambda trial: (None, "no"))
    one = ops(threads=1)
    with pytest.raises(SurefootError):
        build(recipe(model=Unbuildable), RunFolder(tmp_path / "none"), one)
    assert torch.get_num_threads() == 2
    sf.fit(recipe(until=4), out=tmp_path / "run", operations=ops("off"))
    assert build(recipe(until=4), RunFolder(tmp_path / "run"), one).run is None
    assert torch.get_num_threads() == 2
    built = build(recipe(until=4), RunFolder(tmp_path / "eager"), ops())
    assert environment(tmp_path / "eager")["threads"] == 2
    assert built.run is not None
    built.run.record.discard()


def test_what_was_compiled_and_cannot_be_leaves_the_threads_as_they_were(tmp_path, monkeypatch):
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=ops()):
        if outcome.step == 6:
            break
    monkeypatch.setattr("surefoot.choice.compiled_step", lambda trial: (None, "no"))
    with pytest.raises(OperationsError, match="cannot be here: no"):
        sf.fit(recipe(), out=tmp_path / "run", operations=ops("auto"))
    assert torch.get_num_threads() == 2
