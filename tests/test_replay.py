"""A step that was taken can be taken again, and what differs is found."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, mlp, recipe, surefoot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenarios import SCENARIOS, play

import surefoot as sf
from surefoot.cli.recipe_file import RecipeFile

EVERYTHING = ROOT / "tests/recipes/everything.py"
JUMPING = ROOT / "tests/recipes/jumping.py"


def tree(folder):
    """All files below a folder, with their bytes and times."""
    return {
        p.relative_to(folder): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of everything that makes a step hard to repeat, continued once, with two workers."""
    out = tmp_path_factory.mktemp("replay") / "run"
    sets = ["--workers", "2", "--set", "checkpoint.every=9"]
    first = surefoot("train", EVERYTHING, "epochs=4", "--out", out, *sets, "--set", "budget.updates=25")
    assert first.returncode == 4, first.stderr
    assert surefoot("train", EVERYTHING, "epochs=4", "--out", out, *sets).returncode == 0
    return out


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 47))
def test_any_step_reproduces(trained, step):
    """With dropout, batch norm, augmentation by three generators, micro-batches, a ragged tail."""
    everything = RecipeFile(EVERYTHING)
    before = tree(trained)
    done = sf.replay_step(everything.make(everything.parse(["epochs=4"])), trained, step=step)
    assert (done.verdict, done.differences, done.rounding) == ("reproduced", [], 0.0)
    view = sf.open_run(trained)
    assert done.ids == view.plan.ids(step).tolist()
    assert np.mean(done.losses) == pytest.approx(view.log()["loss"][step], rel=1e-5)
    norm = view.log()["grad_norm"][step]
    assert np.linalg.norm(list(done.layers.values())) == pytest.approx(norm, rel=1e-5)
    assert tree(trained) == before


def test_the_command(trained, tmp_path):
    before = tree(trained)
    told = surefoot("replay", trained, "--step", 30, "--out", tmp_path / "step.json")
    assert told.returncode == 0, told.stderr
    assert "step 30" in told.stdout
    assert "reproduced" in told.stdout
    shown = json.loads((tmp_path / "step.json").read_text())
    again = json.loads(surefoot("replay", trained, "--step", 30, "--json").stdout)
    assert shown.pop("seconds") > 0
    assert again.pop("seconds") > 0
    assert shown == again
    assert shown["begins"] <= 30
    assert shown["inputs"][0]["shape"] == [16, 12]
    assert tree(trained) == before


def test_a_run_that_went_back_reproduces(tmp_path):
    """The rate jumped, a sample was left out: before, in the midst of and after what the guard did."""
    run = tmp_path / "run"
    assert surefoot("train", JUMPING, "--out", run).returncode == 0
    kinds = [e["kind"] for e in sf.open_run(run).events()]
    assert "rolled_back" in kinds
    assert "quarantined" in kinds
    for step in (100, 199, 200, 332, 419):
        done = surefoot("replay", run, "--step", step)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "reproduced" in done.stdout


@pytest.mark.parametrize("number", [4, 6])
def test_healed_runs_reproduce(tmp_path, number):
    """Samples that are not finite; labels that are wrong for a while."""
    scenario = next(s for s in SCENARIOS if s.number == number)
    play(scenario, 0, sf.Guard(), tmp_path / "run")
    for step in (150, 655, 1199):
        done = sf.replay_step(scenario.recipe(0, sf.Guard()), tmp_path / "run", step=step)
        assert done.verdict == "reproduced"


def test_a_fault_of_the_machine_is_found(tmp_path):
    """A weight changes behind the optimizer's back after step 20: row 21 is the first that shows it."""
    for outcome in sf.steps(recipe(until=40), out=tmp_path / "run"):
        if outcome.step == 20:
            with torch.no_grad():
                outcome.model[2].bias[0] += 1e-3
    assert sf.replay_step(recipe(until=40), tmp_path / "run", step=20).verdict == "reproduced"
    done = sf.replay_step(recipe(until=40), tmp_path / "run", step=30)
    assert done.verdict == "differs"
    assert {d.step for d in done.differences} == {21}
    assert "loss" in {d.column for d in done.differences}


def test_the_command_says_where_it_differs(tmp_path):
    """The same, with a model that makes the mistake itself, once."""
    file = tmp_path / "faulty.py"
    file.write_text(
        f"""import os
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from conftest import mlp, recipe as base

def fault(model, data):
    fault.calls += 1
    if fault.calls == 20 and not os.path.exists({str(tmp_path / "done")!r}):
        open({str(tmp_path / "done")!r}, "w").close()
        with torch.no_grad():
            model[2].bias[0] += 0.5
    return torch.nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")
fault.calls = 0

def recipe(lr: float = 0.1):
    return base(objective=fault, until=30)
"""
    )
    assert surefoot("train", file, "--out", tmp_path / "run").returncode == 0
    done = surefoot("replay", tmp_path / "run", "--step", 25)
    assert done.returncode == 1
    assert "differs from step 19 on" in done.stdout
    assert "fault of the machine" in done.stdout
    assert surefoot("replay", tmp_path / "run", "--step", 18).returncode == 0


def test_it_leaves_the_callers_process_as_it_was(tmp_path):
    sf.fit(recipe(), out=tmp_path / "run", operations=sf.Operations(compute={"threads": 2}))
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    done = sf.replay_step(recipe(), tmp_path / "run", step=3)
    assert (torch.rand(1).item(), np.random.rand()) == expected
    assert done.changed == {}  # the run's threads were used
    assert torch.get_num_threads() == 1


def test_another_environment_agrees_to_rounding(tmp_path):
    x, y = blobs(512, features=512)
    wide = {"model": lambda: mlp(512, hidden=512), "data": sf.Arrays(x, y), "batch": sf.Batch(128)}
    sf.fit(recipe(**wide), out=tmp_path / "run")
    two = sf.Operations(compute={"threads": 2, "micro_batch": 64})
    done = sf.replay_step(recipe(**wide), tmp_path / "run", step=5, operations=two)
    assert done.verdict == "agrees"
    assert done.changed == {"threads": [1, 2], "micro_batch": [None, 64]}
    assert 0 < done.rounding < 1e-3


def test_steps_that_the_events_tell_of_but_no_state_holds(tmp_path):
    """After its newest checkpoint the guard left samples out: that is not known well enough."""
    scenario = next(s for s in SCENARIOS if s.number == 4)
    play(scenario, 0, sf.Guard(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(sf.RunDirectoryError, match="the guard acted"):
        sf.replay_step(scenario.recipe(0, sf.Guard()), tmp_path / "run", step=700)
    done = sf.replay_step(scenario.recipe(0, sf.Guard()), tmp_path / "run", step=50)
    assert (done.verdict, done.begins, done.checkpoint) == ("reproduced", 0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--step", "48"], "has no step 48"),
        (["--step", "-1"], "greater than or equal to 0"),
        (["--step", "3", "--recipe", "nowhere.py"], "no such file"),
        (["--step", "3", "--recipe", str(JUMPING)], "epochs"),
        (["--step", "3", "--out", "/nowhere/at/all.json"], "no folder"),
        (["--step", "3", "--set", "compute.thread=1"], "compute.threads"),
        ([], "--step"),
    ],
)
def test_bad_requests(trained, arguments, says):
    before = tree(trained)
    done = surefoot("replay", trained, *arguments)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert tree(trained) == before


def test_a_changed_recipe_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EVERYTHING.read_text())
    assert surefoot("train", file, "epochs=1", "--out", tmp_path / "run").returncode == 0
    file.write_text(EVERYTHING.read_text().replace("Dropout(0.3)", "Dropout(0.4)"))
    done = surefoot("replay", tmp_path / "run", "--step", 3)
    assert done.returncode == 2
    assert "recipe.model" in done.stderr
    file.unlink()
    elsewhere = tmp_path / "elsewhere" / "mine.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(EVERYTHING.read_text())
    gone = surefoot("replay", tmp_path / "run", "--step", 3)
    assert gone.returncode == 2
    assert "--recipe" in gone.stderr
    assert surefoot("replay", tmp_path / "run", "--step", 3, "--recipe", elsewhere).returncode == 0


def test_a_run_of_the_api_says_what_it_needs(fit):
    done = surefoot("replay", fit().run_dir, "--step", 1)
    assert done.returncode == 2
    assert "replay_step" in done.stderr


def test_a_damaged_state_is_passed_over(trained, tmp_path):
    """The nearest state is broken: an earlier one does as well."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for file in sorted(copy.glob("checkpoints/*/model.safetensors"))[1:]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    newest = sorted(copy.glob("checkpoints/*"))[-1]
    done = subprocess.run(
        [sys.executable, "-m", "surefoot", "replay", str(copy), "--step", "47", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] != newest.name
