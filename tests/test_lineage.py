"""Where a run went back, its ledger shows a new segment of its lineage: alike in every repetition."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import blobs, copied, recipe, surefoot
from hypothesis import given
from hypothesis import strategies as st
from scenarios import SCENARIOS, base, mixture, play
from test_heal import events, jump

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.cli.tables import _lineage
from surefoot.data.plan import Plan
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.record.ledger import EMPTY, Branch, Ledger, ledgers, segments
from surefoot.segments import begins_of_segments, branches_of, disagree
from surefoot.types import HOLE

BY_NUMBER = {s.number: s for s in SCENARIOS}
OFTEN = Operations(checkpoint={"every": 37, "keep_last": 100}, progress="off")


def lineage(path):
    return sf.open_run(path).summary()["lineage"]


def ids_of(step, attempt):
    return np.array([step, 7 * attempt])


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 30)), max_size=6), st.integers(0, 5))
def test_segments_are_the_way_and_what_was_given_up(turns, last):
    """Beside a model of it: a list of (step, segment it was taken in), cut where the run goes back."""
    way, ledger, branches = [], Ledger(), []
    heads = [EMPTY]  # after each step of the way
    lengths = [length for length, _ in turns] + [last]
    for number, length in enumerate(lengths):
        for step in range(len(way), len(way) + length):
            way.append((step, number))
            ledger.extend(step, ids_of(step, number))
            heads.append(ledger.value)
        if number < len(turns):
            begins = min(turns[number][1], len(way))
            left, way, heads = len(way), way[:begins], heads[: begins + 1]
            ledger = ledger.back_to(begins, heads[-1], left=left)
            branches.append(Branch(left, begins, heads[-1]))
    assert list(ledger.branches) == branches
    assert branches_of(json.loads(json.dumps(ledger.to_json()))) == branches
    found = segments(ledger.branches)
    assert len(found) == len(turns) + 1
    assert [found[0].begins, found[0].ledger, found[-1].ends, found[-1].kept] == [0, EMPTY, None, None]
    for number, segment in enumerate(found[:-1]):
        assert segment.begins <= segment.kept <= segment.ends
        of_it = [step for step, taken_in in way if taken_in == number]
        assert of_it == list(range(segment.begins, segment.kept)), number
    told = begins_of_segments(ledger.to_json())
    assert all(heads[begins] == head for _, begins, head in told)
    on_the_way = [b for n, b in enumerate(branches) if all(x.begins >= b.begins for x in branches[n + 1 :])]
    assert [(begins, head) for _, begins, head in told] == [(b.begins, b.ledger) for b in on_the_way]


@given(st.lists(st.booleans(), max_size=20), st.sets(st.integers(0, 25), max_size=6))
def test_a_ledger_that_is_made_again_is_that_of_the_run(permitted, at):
    ledger, heads = Ledger(), {0: EMPTY}
    for step, applied in enumerate(permitted):
        if applied:
            ledger.extend(step, ids_of(step, 0))
        heads[step + 1] = ledger.value
    made = ledgers(at, lambda step: ids_of(step, 0), permitted)
    assert made == {number: heads[number] for number in at if number in heads}


# ---------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def jumped(tmp_path_factory):
    return sf.fit(jump(), out=tmp_path_factory.mktemp("jumped") / "run")


def test_a_rollback_begins_a_segment(jumped):
    view = sf.open_run(jumped.run_dir)
    (back,) = events(jumped.run_dir, "rolled_back")
    first, second = view.summary()["lineage"]
    assert first == {"begins": 0, "ends": back["at"] + 1, "kept": back["step"], "ledger": EMPTY}
    assert second == {"begins": back["step"], "ends": None, "kept": None, "ledger": back["ledger"]}
    assert view.verify() == []
    # by hand, from the plan and all rows
    ledger, rows, heads = Ledger(), view.log(all_rows=True), {}
    history = view.history()
    for step, permitted in zip(rows["step"].tolist(), rows["permitted"].tolist(), strict=True):
        if step in heads:
            break
        if permitted:
            ids = view.plan.ids(step)
            holes = history.holes(step, ids)
            ledger.extend(step, ids if holes is None else np.where(holes, HOLE, ids))
        heads[step] = ledger.value
    assert heads[back["step"] - 1] == second["ledger"]
    assert heads[back["at"]] == back["given_up"] != second["ledger"]


def test_people_are_shown_segments_where_there_are_several(jumped, tmp_path):
    shown = surefoot("show", jumped.run_dir)
    (back,) = events(jumped.run_dir, "rolled_back")
    assert f"lineage        1: steps 0 to {back['at']}, given up from step 400 on" in shown.stdout
    assert f"2: from step 400 on; ledger there {back['ledger'][:12]}" in shown.stdout
    assert json.loads(surefoot("show", jumped.run_dir, "--json").stdout)["lineage"] == lineage(
        jumped.run_dir
    )
    told = json.loads(surefoot("explain", jumped.run_dir, "--json").stdout)
    (action,) = [i["action"] for i in told["incidents"] if "went back" in i["title"]]
    assert f"a new segment, from ledger {back['ledger'][:12]}" in action
    sf.fit(recipe(), out=tmp_path / "run")
    assert "lineage" not in surefoot("show", tmp_path / "run").stdout
    assert lineage(tmp_path / "run") == [{"begins": 0, "ends": None, "kept": None, "ledger": EMPTY}]


@pytest.mark.parametrize("recipe_", [recipe(until=60), BY_NUMBER[4].recipe(0, sf.Guard())])
def test_what_is_no_rollback_begins_none(tmp_path, recipe_):
    """Restarts; refused updates; samples that are left out."""
    for outcome in sf.steps(recipe_, out=tmp_path / "run", operations=OFTEN):
        if outcome.step == 55:
            copied(tmp_path / "run", tmp_path / "killed")
            break
    for name in ("run", "killed"):
        sf.fit(recipe_, out=tmp_path / name, operations=OFTEN)
        assert len(lineage(tmp_path / name)) == 1


def test_an_interrupted_run_has_the_same_lineage(tmp_path, jumped):
    """Stopped, and copied as a kill leaves it, before, within and after the rollback."""
    copies = []
    for stop in (450, 505):
        for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
            if outcome.step == stop and not events(tmp_path / "run", "rolled_back"):
                break
    for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
        if outcome.step in (401, 480, 600):
            copies.append(copied(tmp_path / "run", tmp_path / f"copy{len(copies)}"))
    assert len(copies) == 3
    for copy in copies:
        sf.fit(jump(), out=copy, operations=OFTEN)
    for path in (tmp_path / "run", *copies):
        assert lineage(path) == lineage(jumped.run_dir)
        assert sf.open_run(path).verify() == []


def test_a_rollback_whose_checkpoint_is_lost_is_made_again(tmp_path, jumped):
    """As a kill leaves it that comes between the event and the checkpoint."""
    for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
        if outcome.step == 401 and events(tmp_path / "run", "rolled_back"):
            copied(tmp_path / "run", tmp_path / "killed")
            break
    newest = sf.open_run(tmp_path / "killed").checkpoints()[-1]
    assert newest.step == 400
    shutil.rmtree(newest.path)
    assert len(lineage(tmp_path / "killed")) == 1  # as of the newest checkpoint
    sf.fit(jump(), out=tmp_path / "killed", operations=OFTEN)
    assert len(events(tmp_path / "killed", "rolled_back")) == 2
    assert lineage(tmp_path / "killed") == lineage(jumped.run_dir)


def damaged(path, at):
    """A run whose weights the machine damages after some steps, each time once; its summary."""
    left = list(at)
    for outcome in sf.steps(base(0, sf.Guard()), out=path, operations=OFTEN):
        if left and outcome.step == left[0]:
            left.pop(0)
            with torch.no_grad():
                for p in outcome.model.parameters():
                    p.mul_(30.0)
    assert not left
    return sf.open_run(path).summary()


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    return damaged(tmp_path_factory.mktemp("undamaged") / "run", ())


def test_each_rollback_begins_one_and_the_ledger_is_that_of_an_undisturbed_run(tmp_path, undamaged):
    done = damaged(tmp_path / "run", (450, 1000))
    assert (done["digest"], done["ledger"]) == (undamaged["digest"], undamaged["ledger"])
    assert len(undamaged["lineage"]) == 1
    first, second, third = done["lineage"]
    assert (first["begins"], first["kept"], second["begins"]) == (0, 200, 200)
    assert (second["kept"], third["begins"], third["ends"]) == (800, 800, None)
    assert first["ends"] > 450
    assert second["ends"] > 1000
    assert sf.open_run(tmp_path / "run").verify() == []


def test_a_segment_that_was_given_up_whole(tmp_path, undamaged):
    """A second alarm soon after the first goes back to before where the second segment begins."""
    done = damaged(tmp_path / "run", (450, 440))
    assert (done["digest"], done["ledger"]) == (undamaged["digest"], undamaged["ledger"])
    first, second, third = done["lineage"]
    assert (first["kept"], second["begins"], second["kept"], third["begins"]) == (0, 200, 200, 0)
    assert third["ledger"] == EMPTY
    shown = surefoot("show", tmp_path / "run").stdout
    assert f"2: steps 200 to {second['ends'] - 1}, given up; ledger there" in shown
    assert "3: from step 0 on\n" in shown.replace(" \n", "\n").replace("  ", "")
    assert sf.open_run(tmp_path / "run").verify() == []


def test_a_run_that_ends_where_it_went_back_to_says_so(tmp_path):
    """Nothing helped: the weights are those of a healthy state, which the log lies beyond."""
    done = play(BY_NUMBER[14], 0, sf.Guard(), tmp_path / "run")
    view = sf.open_run(tmp_path / "run")
    assert (done.status, events(tmp_path / "run", "rolled_back")) == ("diverged", [])
    assert "did not help" in view.summary()["reason"]
    first, second = view.summary()["lineage"]
    assert first["kept"] == second["begins"] == view.summary()["checkpoint_step"] == 0
    assert first["ends"] == view.summary()["step"] > 100
    assert second["ledger"] == view.summary()["ledger"] == done.ledger == EMPTY
    assert view.verify() == []
    (ended,) = events(tmp_path / "run", "diverged")
    assert (ended["left"], ended["ledger"]) == (first["ends"], EMPTY)
    assert "2: the state after 0 updates, where the run ended" in surefoot("show", tmp_path / "run").stdout


def killed_before_it_says_that_it_ended(recipe_, path):
    """As a kill leaves it that comes after the last checkpoint of a run."""
    built = build(recipe_, RunFolder(path), OFTEN)
    finish = built.run.keeper.finish

    def finish_and_die(**how):
        finish(**how)
        raise KeyboardInterrupt

    built.run.keeper.finish = finish_and_die
    built.run.record.event, tell = forgetful(built.run.record.event), built.run.record.event
    with pytest.raises(KeyboardInterrupt):
        for _ in run_steps(built):
            pass
    built.run.record.event = tell


def forgetful(event):
    return lambda kind, **facts: None if kind == "ended" else event(kind, **facts)


@pytest.mark.parametrize("how", ["nothing helps", "too many samples"])
def test_a_run_that_diverged_does_not_go_on_after_a_kill(tmp_path, how):
    x, y = blobs(512)
    x[::9] = np.nan
    recipe_ = {
        "nothing helps": BY_NUMBER[14].recipe(0, sf.Guard()),
        "too many samples": recipe(data=sf.Arrays(x, y), guard=sf.Guard(max_quarantined=0.001), until=90),
    }[how]
    whole = sf.fit(recipe_, out=tmp_path / "whole", operations=OFTEN)
    assert whole.status == "diverged"
    killed_before_it_says_that_it_ended(recipe_, tmp_path / "run")
    assert sf.open_run(tmp_path / "run").status == "failed"
    done = sf.fit(recipe_, out=tmp_path / "run", operations=OFTEN)
    assert (done.status, done.exit_code) == ("diverged", 3)
    told, other = (sf.open_run(tmp_path / name).summary() for name in ("run", "whole"))
    for fact in ("status", "reason", "step", "digest", "ledger", "lineage", "interventions"):
        assert told[fact] == other[fact], fact
    assert sf.fit(recipe_, out=tmp_path / "run", operations=OFTEN).status == "diverged"


def test_of_weights_that_are_not_finite_the_steps_that_were_taken_count(tmp_path):
    """They are noticed when a checkpoint is written, in the middle of the guard's 200 steps."""
    for outcome in sf.steps(base(0, sf.Guard()), out=tmp_path / "run", operations=OFTEN):
        if outcome.step == 478 and not events(tmp_path / "run", "rolled_back"):
            with torch.no_grad():
                next(outcome.model.parameters()).fill_(math.nan)
        if outcome.step < 478 and events(tmp_path / "run", "rolled_back"):
            break
    view = sf.open_run(tmp_path / "run")
    (back,) = events(tmp_path / "run", "rolled_back")
    given_up = view.log(all_rows=True)["step"][:-1].max() + 1
    assert view.summary()["lineage"][0]["ends"] == given_up == back["left"] <= back["at"] + 1
    told = surefoot("explain", tmp_path / "run").stdout
    assert f"the run went back from step {given_up - 1} to step {back['step']}" in told
    assert f"{given_up - back['step']} updates" in told
    assert view.verify() == []


def test_a_segment_that_plan_and_log_do_not_give_is_found(tmp_path):
    for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
        if outcome.step == 450 and events(tmp_path / "run", "rolled_back"):
            break
    built = build(jump(), RunFolder(tmp_path / "run"), OFTEN)
    state = built.run.state
    (branch,) = state.ledger.branches
    state.ledger = Ledger(state.ledger.value, [branch._replace(ledger="ab" * 32)])
    for _ in run_steps(built):
        pass
    found = sf.open_run(tmp_path / "run").verify()
    assert found
    what = (
        "the ledger where segment 2 begins, after 400 updates, is abababababab..., but plan and log give "
    )
    assert {f.what.startswith(what) for f in found} == {True}
    assert found[-1].file == f"checkpoints/{sf.open_run(tmp_path / 'run').checkpoints()[-1].path.name}"


FALSE = {
    "none": lambda branch: [],
    "twice": lambda branch: [branch, branch],
    "left": lambda branch: [branch._replace(left=10_000)],
    "begins": lambda branch: [branch._replace(begins=0, ledger=EMPTY)],
    "hidden": lambda branch: [branch._replace(ledger="ab" * 32), Branch(500, 0, EMPTY)],
}


@pytest.mark.parametrize("how", FALSE)
def test_segments_that_are_not_those_of_what_the_guard_did_are_found(tmp_path, how):
    for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
        if outcome.step == 450 and events(tmp_path / "run", "rolled_back"):
            break
    built = build(jump(), RunFolder(tmp_path / "run"), OFTEN)
    ledger = built.run.state.ledger
    built.run.state.ledger = Ledger(ledger.value, FALSE[how](*ledger.branches))
    for _ in run_steps(built):
        pass
    found = {f.what for f in sf.open_run(tmp_path / "run").verify()}
    assert "its segments are not those of what the guard did" in found


ROLLBACK, RELEASE = ["rollback", 200, 340, 0.0, []], ["release", 300, 300, 0.0, [7]]


@pytest.mark.parametrize(
    ("done", "branches", "wrong"),
    [
        ([], [], False),
        ([ROLLBACK], [[341, 200]], False),
        ([ROLLBACK], [[300, 200]], False),  # weights that are not finite
        ([ROLLBACK], [[199, 200]], True),
        ([RELEASE], [], False),  # no step was given up
        ([RELEASE], [[331, 300]], False),
        ([RELEASE], [[331, 200]], True),
        ([RELEASE], [[331, 300], [331, 300]], True),
        ([ROLLBACK, RELEASE], [[341, 200], [331, 300]], False),
        ([RELEASE, ROLLBACK], [[331, 300], [341, 200]], False),
        ([RELEASE, ROLLBACK], [[331, 300]], True),
    ],
)
def test_branches_are_those_of_what_was_done(done, branches, wrong):
    history = {"decided": len(done), "list": done}
    facts = {"branches": [[*b, EMPTY] for b in branches], "stateful": {"guard": {"history": history}}}
    assert disagree(facts) is wrong


def test_a_run_of_a_version_that_kept_no_branches_has_segments_without_ledgers(
    tmp_path, monkeypatch, jumped
):
    def as_it_was(self):
        return {"ledger": self.value}

    with monkeypatch.context() as before:
        before.setattr(Ledger, "to_json", as_it_was)
        for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
            if outcome.step == 450 and events(tmp_path / "run", "rolled_back"):
                break
    first, second = lineage(jumped.run_dir)
    unknown = [first, second | {"ledger": None}]
    assert lineage(tmp_path / "run") == unknown
    assert sf.open_run(tmp_path / "run").verify() == []
    assert "2: from step 400 on" in surefoot("show", tmp_path / "run").stdout
    done = sf.fit(jump(), out=tmp_path / "run", operations=OFTEN)
    assert done.ledger == jumped.ledger
    assert lineage(tmp_path / "run") == unknown
    assert sf.open_run(tmp_path / "run").verify() == []


def test_of_a_state_that_cannot_be_read_no_lineage_is_told(tmp_path):
    sf.fit(recipe(), out=tmp_path / "run")
    newest = sf.open_run(tmp_path / "run").checkpoints()[-1]
    kept = (newest.path / "state.json").read_bytes()
    for damaged in (kept.replace(b'"branches"', b'"brunches"'), kept.replace(b"[]", b"[1]", 1), b"{", b""):
        (newest.path / "state.json").write_bytes(damaged)
        summary = sf.open_run(tmp_path / "run").summary()
        assert (summary["lineage"], summary["ledger"], summary["digest"]) == (None, None, None)
        assert surefoot("show", tmp_path / "run").returncode == 0


def test_of_many_segments_the_newest_are_shown():
    begins = range(60)
    told = segments([Branch(n + 5, n, f"{n:064x}") for n in begins])
    lines = _lineage({"lineage": [s._asdict() for s in told], "status": "finished", "checkpoint_step": 90})
    assert lines[0] == "1 to 53: see --json"
    assert [line.partition(":")[0] for line in lines[1:]] == [str(n) for n in range(54, 62)]
    assert lines[-1].startswith("61: from step 59 on; ledger there 0000")


# ---------------------------------------------------------------------------------- released


def test_a_release_begins_one_if_steps_were_taken_without_the_samples(tmp_path):
    recipe_ = BY_NUMBER[4].recipe(0, sf.Guard())
    often = sf.Operations(checkpoint={"every": 50})
    for outcome in sf.steps(recipe_, out=tmp_path / "run", operations=often):
        if outcome.step == 330:
            copied(tmp_path / "run", tmp_path / "killed", step=300)
            break
    one, other = sf.open_run(tmp_path / "run").summary()["quarantined"][:2]
    for name, steps in (("run", 331), ("killed", None)):
        for sample in (one, other):  # the second changes nothing about where it branched
            assert surefoot("release", tmp_path / name, sample).returncode == 0
        found = lineage(tmp_path / name)
        if steps:  # the state is that after the last step
            assert len(found) == 1
        else:
            logged = len(sf.open_run(tmp_path / name).log()["step"])
            assert logged > 300
            assert limits(found) == [(0, logged, 300), (300, None, None)]
        done = sf.fit(recipe_, out=tmp_path / name, operations=often)
        assert done.status == "finished"
        assert lineage(tmp_path / name) == found
        assert sf.open_run(tmp_path / name).verify() == []


def limits(found):
    return [(s["begins"], s["ends"], s["kept"]) for s in found]


def test_a_release_right_after_a_rollback_begins_no_other(tmp_path):
    """None of its steps has been taken when the run is killed."""
    recipe_ = jump(data=sf.Arrays(*with_a_bad_sample()))
    built = build(recipe_, RunFolder(tmp_path / "run"), OFTEN)
    went_back = built.run.keeper.went_back

    def and_died():
        went_back()
        raise KeyboardInterrupt

    built.run.keeper.went_back = and_died
    with pytest.raises(KeyboardInterrupt):
        for _ in run_steps(built):
            pass
    before = lineage(tmp_path / "run")
    assert len(before) == 2
    assert surefoot("release", tmp_path / "run", "--all").returncode == 0
    assert lineage(tmp_path / "run") == before


def with_a_bad_sample():
    x, y = mixture(1000, 64 * 900)
    x[Plan(len(x), 64, seed=0).ids(100)[0], 3] = np.nan
    return x, y


def test_a_second_release_begins_one_if_steps_were_taken_in_between(tmp_path):
    """The run is killed at the same step each time."""
    recipe_ = BY_NUMBER[4].recipe(0, sf.Guard())
    often = sf.Operations(checkpoint={"every": 50})
    path = tmp_path / "run"
    for n in range(3):
        for outcome in sf.steps(recipe_, out=path, operations=often):
            if outcome.step == 330:
                copied(path, tmp_path / f"killed{n}", step=300)
                break
        path = tmp_path / f"killed{n}"
        if n < 2:
            sample = sf.open_run(path).summary()["quarantined"][0]
            assert surefoot("release", path, sample).returncode == 0
    found = limits(lineage(path))
    logged = len(sf.open_run(path).log()["step"])
    assert found == [(0, logged, 300), (300, logged, 300), (300, None, None)]
    assert sf.open_run(path).verify() == []
