"""How many threads torch's kernels have: a rule for compiled steps. The caller's code has its own."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, flat, recipe
from torch import nn

import surefoot as sf
from surefoot.build import build
from surefoot.choice import SHORT, SMALL
from surefoot.errors import OperationsError, SurefootError
from surefoot.laps import Laps
from surefoot.operations import Operations
from surefoot.prepare import prepare
from surefoot.record.events import read_events
from surefoot.record.folder import RunFolder
from surefoot.trials import Trial
from surefoot.tune.compute import _alternatives
from surefoot.work import count

FEATURES = 512


def large():
    return nn.Linear(FEATURES, 96)  # of 32 rows: 2 * 32 * 512 * 96 operations


def not_so_large():
    return nn.Linear(FEATURES, 64)


class Forward(nn.Module):
    """A small layer behind what `of` makes of its input."""

    def __init__(self, of, features=FEATURES):
        super().__init__()
        self.of, self.last = of, nn.Linear(features, 3)

    def forward(self, x):
        return self.last(self.of(x))


def many_weights():
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Linear(64, FEATURES), nn.Linear(FEATURES, 3))


def elementwise():
    return Forward(lambda x: x.repeat(1, 8).tanh()[:, :FEATURES])


def attention():
    def attend(x):
        x = x.unflatten(1, (1, 64, 8))
        return F.scaled_dot_product_attention(x, x, x).flatten(1)

    return Forward(attend)


def derivative():
    """What a gradient penalty does."""

    def attend(x):
        of = x.unflatten(1, (1, 64, 8)).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.scaled_dot_product_attention(of, of, of).sum(), of)
        return gradient.flatten(1)

    return Forward(attend)


def uncountable():
    def choose(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    return Forward(choose)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def ops(compile="on", **more):
    return Operations(compute={"compile": compile, **more}, checkpoint={"every": 4}, progress="off")


def environment(path):
    return RunFolder(path).identity()["environment"]


def events(path, kind):
    return [event for event in read_events(RunFolder(path).events_file)[0] if event["kind"] == kind]


def wide(model=not_so_large, **changes):
    return recipe(model=model, data=sf.Arrays(*blobs(features=FEATURES)), **({"until": 12} | changes))


def counted(model):
    made = prepare(wide(model), ops("off"))
    return count(Trial(made.parts, made.state, made.feed(lambda kind, **facts: None).at, made.total))


@pytest.mark.parametrize(
    ("model", "operations", "threads"),
    [
        (not_so_large, ops(), 1),
        (large, ops(), 2),
        (not_so_large, ops(threads=2), 2),
        (not_so_large, ops("off"), 2),
        (many_weights, ops(), 2),
        (elementwise, ops(), 2),
    ],
    ids=["short", "long", "asked for", "eager", "weights", "elementwise"],
)
def test_kernels_that_are_short_have_one_thread_in_a_compiled_step(tmp_path, model, operations, threads):
    sf.fit(wide(model), out=tmp_path / "run", operations=operations)
    found = environment(tmp_path / "run")
    assert found["threads"] == threads
    assert found["compiled"] == ("step" if operations.compute.compile == "on" else "")


def test_what_is_counted():
    assert counted(not_so_large).most == SHORT
    assert counted(large).most == 1.5 * SHORT
    assert sum(p.numel() for p in large().parameters()) < SMALL
    assert counted(many_weights).most == SHORT
    assert counted(many_weights).elements < SMALL < sum(p.numel() for p in many_weights().parameters())
    assert counted(not_so_large).elements == FEATURES * 64
    assert counted(elementwise).elements == 8 * 32 * FEATURES > SMALL
    assert counted(elementwise).most < SHORT
    assert counted(attention).most == 2 * 2 * 32 * 64 * 64 * 8 > SHORT
    assert counted(derivative).most == 5 * 2 * 32 * 64 * 64 * 8
    assert "cond" in counted(uncountable)


def test_a_step_whose_operations_cannot_be_counted_keeps_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.choice.count", lambda trial: "no")
    sf.fit(wide(), out=tmp_path / "run", operations=ops())
    assert environment(tmp_path / "run")["threads"] == 2


def test_the_rule_is_that_of_a_run_that_nobody_decided_on(tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.choice.ENOUGH_UPDATES", 12)
    built = build(wide(), RunFolder(tmp_path / "run"), Operations())
    assert any("for one thread: its kernels are short" in note for note in built.notes), built.notes
    assert environment(tmp_path / "run")["compiled"] == "step"
    built.run.record.discard()


@pytest.mark.parametrize("asked", ["auto", "on"])
@pytest.mark.parametrize("first", [{}, {"threads": 2}, {"threads": 1}], ids=["rule", "two", "one"])
@pytest.mark.parametrize("here", [1, 2])
def test_a_run_goes_on_with_the_threads_it_had(tmp_path, monkeypatch, first, here, asked):
    """Also one of a version that had no such rule."""
    monkeypatch.setattr("surefoot.choice.ENOUGH_UPDATES", 12)
    whole = sf.fit(wide(), out=tmp_path / "whole", operations=ops(asked, **first))
    for outcome in sf.steps(wide(), out=tmp_path / "parts", operations=ops(asked, **first)):
        if outcome.step == 6:
            break
    begun_with = environment(tmp_path / "parts")["threads"]
    assert begun_with == (2 if first.get("threads") == 2 else 1)
    torch.set_num_threads(here)
    built = build(wide(), RunFolder(tmp_path / "parts"), ops(asked))
    assert any("as the run began" in note for note in built.notes) == (begun_with < here)
    built.run.record.close()
    parts = sf.fit(wide(), out=tmp_path / "parts", operations=ops(asked))
    torch.set_num_threads(2)
    *_, resumed = events(tmp_path / "parts", "resumed")
    if begun_with == 2 and here == 1:  # no more than there are
        assert resumed["environment_changed"] == {"threads": [2, 1]}
    else:
        assert not resumed.get("environment_changed")
        assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert sf.replay_step(wide(), tmp_path / "whole", step=9).differences == []


def test_the_body_has_its_own_threads(tmp_path):
    seen = []
    for outcome in sf.steps(wide(), out=tmp_path / "run", operations=ops()):
        seen.append(torch.get_num_threads())
        if outcome.step == 3:
            torch.set_num_threads(4)
        if outcome.step == 5:
            sf.fit(wide(), out=tmp_path / "within", operations=ops("off"))
    assert seen == [2] * 4 + [4] * 8
    assert environment(tmp_path / "within")["threads"] == 4
    assert torch.get_num_threads() == 4  # as it was left
    torch.set_num_threads(2)
    alone = sf.fit(wide(), out=tmp_path / "alone", operations=ops())
    assert torch.equal(flat(outcome.model), flat(alone.model))
    assert environment(tmp_path / "run")["threads"] == 1


def test_runs_whose_steps_are_taken_in_turns_have_each_their_own_threads(tmp_path):
    """Ended in the order in which they began."""
    seen = {"a": [], "b": []}

    def watched(name, inputs, model):
        seen[name].append(torch.get_num_threads())
        return F.cross_entropy(model(inputs[0]), inputs[1], reduction="none")

    def of(name):
        objective = lambda model, data: watched(name, data, model)  # noqa: E731
        return sf.steps(wide(objective=objective), out=tmp_path / name, operations=given[name])

    given = {"a": ops("off", threads=1), "b": ops("off")}
    a, b = of("a"), of("b")
    for _ in range(6):
        next(a), next(b)
    assert len(list(a)) == 6
    assert torch.get_num_threads() == 2
    assert len(list(b)) == 6
    assert set(seen["a"]) == {1}
    assert set(seen["b"]) == {2}


def test_laps_go_on_beside_python_where_the_caller_has_two_threads(tmp_path, monkeypatch):
    """And a validation has the run's number, too."""
    begin, beside, seen = Laps.begin, [], []

    def begun(laps, *of):
        beside.append(laps.goes_on_meanwhile)
        return begin(laps, *of)

    def accuracy(model, data):
        seen.append(torch.get_num_threads())
        return (model(data[0]).argmax(1) == data[1]).float()

    monkeypatch.setattr(Laps, "begin", begun)
    validation = sf.Validation(sf.Arrays(*blobs(features=FEATURES)), {"accuracy": accuracy}, every=100)
    sf.fit(wide(until=200, validation=validation), out=tmp_path / "run", operations=ops())
    assert beside
    assert all(beside) == (len(os.sched_getaffinity(0)) > 1)
    assert set(seen[1:]) == {1}  # the first is tried out before there is a choice


def test_alternatives_are_each_number_of_threads_eager_and_compiled():
    made = SimpleNamespace(model=nn.Linear(1, 1), device=torch.device("cpu"))
    first, *others = _alternatives(recipe(), made, 2)
    assert first == {"compute.compile": "off", "compute.threads": 2}
    assert others == [
        {"compute.threads": 1},
        {"compute.compile": "on", "compute.threads": 1},
        {"compute.compile": "on", "compute.threads": 2},
    ]


class Unbuildable(nn.Module):
    def __init__(self):
        raise ValueError("no")


def test_threads_are_the_callers_again_when_nothing_is_run(tmp_path, monkeypatch):
    one = ops("off", threads=1)
    with pytest.raises(SurefootError):
        build(recipe(model=Unbuildable), RunFolder(tmp_path / "none"), one)
    assert torch.get_num_threads() == 2
    sf.fit(recipe(until=4), out=tmp_path / "run", operations=one)
    assert build(recipe(until=4), RunFolder(tmp_path / "run"), one).run is None
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("surefoot.choice.compiled_step", lambda trial: (None, "no"))
    built = build(recipe(until=4), RunFolder(tmp_path / "eager"), ops())  # no whole step
    assert environment(tmp_path / "eager")["threads"] == 2
    built.run.record.discard()


def test_what_was_compiled_and_cannot_be_leaves_the_threads_as_they_were(tmp_path, monkeypatch):
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=ops()):
        if outcome.step == 6:
            break
    monkeypatch.setattr("surefoot.choice.compiled_step", lambda trial: (None, "no"))
    with pytest.raises(OperationsError, match="cannot be here: no"):
        sf.fit(recipe(), out=tmp_path / "run", operations=ops("auto"))
    assert torch.get_num_threads() == 2
