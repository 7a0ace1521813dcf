"""Where a run went back, its ledger shows a new segment of its lineage: alike in every repetition."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import copied, recipe, surefoot
from hypothesis import given
from hypothesis import strategies as st
from scenarios import SCENARIOS, base, play
from test_heal import events, jump

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.record.ledger import EMPTY, Branch, Ledger, begins_of_segments, ledgers, segments
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
    assert Ledger.of(json.loads(json.dumps(ledger.to_json()))).to_json() == ledger.to_json()
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
    assert f"lineage        steps 0 to {back['at']}, given up from step 400 on" in shown.stdout
    assert f"from step 400 on; ledger there {back['ledger'][:12]}" in shown.stdout
    assert json.loads(surefoot("show", jumped.run_dir, "--json").stdout)["lineage"] == lineage(
        jumped.run_dir
    )
    told = json.loads(surefoot("explain", jumped.run_dir, "--json").stdout)
    (action,) = [i["action"] for i in told["incidents"] if "went back" in i["title"]]
    assert f"a new segment, from ledger {back['ledger'][:12]}" in action
    sf.fit(recipe(), out=tmp_path / "run")
    assert "lineage" not in surefoot("show", tmp_path / "run").stdout
    assert lineage(tmp_path / "run") == [{"begins": 0, "ends": None, "kept": None, "ledger": EMPTY}]


@pytest.mark.parametrize("number", [1, 4])
def test_what_is_no_rollback_begins_none(tmp_path, number, fit):
    """Restarts; refused updates; samples that are left out."""
    recipe_ = BY_NUMBER[4].recipe(0, sf.Guard()) if number == 4 else recipe(until=60)
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
    assert "steps 200 to" in (shown := surefoot("show", tmp_path / "run").stdout)
    assert ", given up; ledger there" in shown
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
    assert f"{found[-1].file}" == f"checkpoints/{sf.open_run(tmp_path / 'run').checkpoints()[-1].path.name}"


# ---------------------------------------------------------------------------------- released


def test_a_release_begins_one_if_steps_were_taken_without_the_samples(tmp_path):
    recipe_ = BY_NUMBER[4].recipe(0, sf.Guard())
    often = sf.Operations(checkpoint={"every": 50})
    for outcome in sf.steps(recipe_, out=tmp_path / "run", operations=often):
        if outcome.step == 330:
            copied(tmp_path / "run", tmp_path / "killed")
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
            assert [(s["begins"], s["ends"], s["kept"]) for s in found] == [
                (0, logged, 300),
                (300, None, None),
            ]
        done = sf.fit(recipe_, out=tmp_path / name, operations=often)
        assert done.status == "finished"
        assert lineage(tmp_path / name) == found
        assert sf.open_run(tmp_path / name).verify() == []
