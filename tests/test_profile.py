"""A profile on demand: a trace in the run, phases by name, the same bits."""

import json

import pytest
from conftest import ROOT, recipe, surefoot

import surefoot as sf


def names(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    return [e["name"] for e in events if e.get("cat") == "user_annotation"]


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_some_steps_are_recorded_and_the_bits_are_the_same(tmp_path, compiled):
    operations = {"compute": {"compile": compiled}}
    plain = sf.fit(recipe(), out=tmp_path / "plain", operations=sf.Operations(**operations))
    done = sf.fit(recipe(), out=tmp_path / "run", operations=sf.Operations(profile=4, **operations))
    assert (done.digest, done.ledger) == (plain.digest, plain.ledger)
    (told,) = [e for e in sf.open_run(done.run_dir).events() if e["kind"] == "profiled"]
    trace = done.run_dir / told["file"]
    found = names(trace)
    assert [n for n in found if n.startswith("step ")] == [f"step {i}" for i in range(3, 7)]
    phases = (
        ("compiled step",) if compiled == "on" else ("forward", "backward", "permit and clip", "update")
    )
    assert all(found.count(phase) == 4 for phase in ("data", "row", *phases))
    assert "forward" in trace.with_suffix(".txt").read_text() or compiled == "on"
    assert sf.open_run(done.run_dir).verify() == []


def test_a_run_shorter_than_its_profile_and_one_that_is_left(tmp_path):
    done = sf.fit(recipe(until=5), out=tmp_path / "short", operations=sf.Operations(profile=100))
    assert names(done.run_dir / "profiles/steps-3-4.json").count("step 4") == 1
    for outcome in sf.steps(recipe(), out=tmp_path / "left", operations=sf.Operations(profile=100)):
        if outcome.step == 6:
            break
    assert (tmp_path / "left/profiles/steps-3-6.json").exists()
    done = sf.fit(recipe(until=2), out=tmp_path / "none", operations=sf.Operations(profile=100))
    assert done.status == "finished"
    assert not (tmp_path / "none/profiles").exists()
    assert why_none(done.run_dir) == "the attempt ended within the 3 steps that warm up"


def why_none(run):
    (told,) = [e for e in sf.open_run(run).events() if e["kind"] == "not_profiled"]
    return told["reason"]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
    plain = sf.fit(recipe(), out=tmp_path / "plain")
    for outcome in sf.steps(recipe(), out=tmp_path / "run"):
        if outcome.step == 2:
            (tmp_path / "run/profiles").touch()
            break
    done = sf.fit(recipe(), out=tmp_path / "run", operations=sf.Operations(profile=4))
    assert (done.status, done.digest) == ("finished", plain.digest)
    assert "could not be written" in why_none(done.run_dir)


def test_on_the_command_line(tmp_path):
    done = surefoot(
        "train", ROOT / "examples/digits.py", "epochs=1", "--out", tmp_path / "run", "--profile", "3"
    )
    assert done.returncode == 0, done.stderr
    assert f"profile of steps 3 to 5: {tmp_path}/run/profiles/steps-3-5.json" in done.stderr
    again = surefoot(
        "train", ROOT / "examples/digits.py", "epochs=1", "--out", tmp_path / "run", "--profile", "3"
    )
    assert "no profile: the run has ended" in again.stderr
    few = ("train", ROOT / "examples/digits.py", "epochs=1", "batch=1000", "--out", tmp_path / "few")
    assert "no profile: the attempt ended within" in surefoot(*few, "--profile", "3").stderr
    wrong = surefoot("train", ROOT / "examples/digits.py", "--out", tmp_path / "no", "--profile", "-1")
    assert wrong.returncode == 2
    assert "profile" in wrong.stderr
