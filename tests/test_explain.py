"""What happened in a run is told from its log and events, and every kind of trouble has a runbook."""

import json
import math
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, copied, mlp, recipe, surefoot, surefoot_process
from safetensors.torch import load_file
from scenarios import SCENARIOS, play
from test_kill import newest_step
from torch import nn

import surefoot as sf
from surefoot.cli.explain import explain_run
from surefoot.export.explain import _on_validation
from surefoot.guard.layers import Layers
from surefoot.record.bundles import LEAVE_A_BUNDLE, redacted, variables
from surefoot.record.incidents import DETECTORS, KINDS, of_event

EVERYTHING = ROOT / "tests/recipes/everything.py"
RUNBOOKS = {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} - {"README"}
BY_NUMBER = {s.number: s for s in SCENARIOS}
EVENT = {
    "n": 7, "time": 1.7e9, "attempt": 1, "step": 3, "reason": "r", "error": "e", "loss": 1.0,
    "grad_norm": 2.0, "ids": [4], "at": 9, "detector": "D3", "cause": "c", "remedy": "m", "tried": ["x"],
    "seconds": 1.5,
    "layer": "a", "how": "vanishes", "stacks": "s", "tries": 2, "newest_good": "none", "retry_s": 1.0,
    "name": "000001-3", "owner": "12", "status": "failed", "failure": "unknown",
}  # fmt: skip


def explained(path):
    return explain_run(sf.open_run(path))


def of_kind(told, kind):
    return [(incident, num) for incident, num in told.incidents if incident.kind == kind]


# ---------------------------------------------------------------------------------- runbooks


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_incident_has_words_and_a_runbook(kind):
    for detector in DETECTORS:
        incident = of_event({**EVENT, "kind": kind, "detector": detector})
        assert incident.runbook in RUNBOOKS
        assert incident.title
        assert incident.cause or incident.evidence
        assert incident.action or incident.advice


def test_every_event_of_the_source_is_an_incident_or_known_to_be_none():
    harmless = {"started", "resumed", "validated", "rate_cut", "checkpointed", "profiled", "healing"}
    told = set()
    for file in (ROOT / "src/surefoot").rglob("*.py"):
        told |= set(re.findall(r'event\(\s*"(\w+)"', file.read_text()))
    told |= {"skipped", "would_skip", "worker_replaced", "borne"}  # by a variable
    assert told - harmless == set(KINDS)


def test_every_detector_and_remark_has_a_runbook():
    assert {runbook for _, runbook in DETECTORS.values()} <= RUNBOOKS
    text = (ROOT / "src/surefoot/export/explain.py").read_text()
    named = set(re.findall(r'^\s+"([a-z]+(?:-[a-z]+)+|plateau|overfitting)",$', text, re.M))
    assert {"data-wait", "plateau", "overfitting", "does-not-learn", "checkpoint-cost"} <= named
    assert named <= RUNBOOKS


def test_runbooks_name_only_commands_that_exist():
    helps = surefoot("--help").stdout
    for file in (ROOT / "docs/runbooks").glob("*.md"):
        for command in re.findall(r"`surefoot (\w+)", file.read_text()):
            assert re.search(rf"^\W*{command}\b", helps, re.M), (file.name, command)


def test_every_runbook_is_listed_and_its_links_lead_somewhere():
    index = (ROOT / "docs/runbooks/README.md").read_text()
    assert {name for name in RUNBOOKS if f"({name}.md)" in index} == RUNBOOKS
    for file in (ROOT / "docs/runbooks").glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", file.read_text()):
            assert (file.parent / link).exists(), (file.name, link)


# ---------------------------------------------------------------------------------- whole runs


def test_a_calm_run_needs_nobody(fit):
    done = fit(until=60, optimizer=sf.SGD(lr=0.02), schedule=sf.cosine())
    told = explained(done.run_dir)
    assert told.verdict.startswith("The run finished: 60 of 60 updates")
    assert told.incidents == []
    shown = surefoot("explain", done.run_dir)
    assert shown.returncode == 0
    assert "What happened" not in shown.stdout


def test_a_healed_run_tells_cause_evidence_action_and_cost(tmp_path):
    play(BY_NUMBER[3], 0, sf.Guard(), tmp_path / "run")
    told = explained(tmp_path / "run")
    ((incident, _),) = of_kind(told, "rolled_back")
    assert "the learning rate jumped" in incident.cause
    assert incident.runbook == "rolled-back"
    assert 500 <= incident.step + incident.lost_steps <= 600
    assert incident.lost_s > 0
    shown = surefoot("explain", tmp_path / "run").stdout
    for word in ("cause", "evidence", "done", "cost", "to do", "docs/runbooks/rolled-back.md"):
        assert word in shown
    machine = json.loads(surefoot("explain", tmp_path / "run", "--json").stdout)
    assert machine["incidents"][0]["title"] == told.incidents[0][0].title


def test_alike_incidents_are_told_of_as_one(tmp_path):
    play(BY_NUMBER[4], 0, sf.Guard(), tmp_path / "run")
    told = explained(tmp_path / "run")
    ((refused, num),) = of_kind(told, "skipped")
    assert num == refused.lost_steps == 12
    assert sum(len(re.findall(r"\d+", i.evidence)) for i, _ in of_kind(told, "quarantined")) == 12


def test_a_kill_is_told_with_its_cost(tmp_path):
    out = tmp_path / "run"
    sets = ["--set", "checkpoint.every=10", "--workers", "0"]
    process = surefoot_process("train", EVERYTHING, "epochs=4", "pause_s=0.004", "--out", out, *sets)
    while newest_step(out) < 27:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ((crash, _),) = of_kind(explained(out), "crash")
    assert "not continued yet" in crash.action
    assert "failed" in explained(out).verdict
    assert surefoot("train", EVERYTHING, "epochs=4", "pause_s=0.004", "--out", out, *sets).returncode == 0
    ((crash, _),) = of_kind(explained(out), "crash")
    assert "continued as attempt 2" in crash.action
    assert 0 < crash.lost_steps <= 30
    assert 0 < crash.lost_s < 120
    resumed = next(e for e in sf.open_run(out).events(all_events=True) if e["kind"] == "resumed")
    assert crash.step - crash.lost_steps == resumed["step"]


def test_a_run_that_learns_nothing_by_heart_or_slowly(fit):
    x, y = blobs(120, classes=3)
    noise = np.random.default_rng(0).integers(0, 3, 120)
    by_heart = fit(
        data=sf.Arrays(x, noise),
        model=lambda: mlp(hidden=256),
        optimizer=sf.SGD(lr=0.3, momentum=0.9),
        batch=sf.Batch(60),
        until=600,
        validation=sf.Validation(sf.Arrays(x[:60], noise[60:]), every=20),
    )
    assert "overfitting" in {r.runbook for r in explained(by_heart.run_dir).remarks}
    slow = fit(data=sf.Arrays(x, y), optimizer=sf.SGD(lr=2e-4), until=200)
    assert "slow-convergence" in {r.runbook for r in explained(slow.run_dir).remarks}
    still = fit(data=sf.Arrays(x, y), optimizer=sf.SGD(lr=1e-9), until=200)
    assert "does-not-learn" in {r.runbook for r in explained(still.run_dir).remarks}
    flat = fit(
        data=sf.Arrays(x, noise), model=lambda: nn.Linear(8, 3), optimizer=sf.SGD(lr=0.05), until=2000
    )
    assert "plateau" in {r.runbook for r in explained(flat.run_dir).remarks}


def test_a_validation_loss_that_does_not_follow(fit):
    x, y = blobs(600)
    x[:4] *= 1e4  # in a fifth of the batches, and in batch norm's running statistics

    def model():
        return nn.Sequential(nn.BatchNorm1d(8), mlp())

    def remarks(x):
        run = fit(
            data=sf.Arrays(x, y), model=model, until=300, guard=sf.Guard("off"),
            validation=sf.Validation(sf.Arrays(*blobs(600)), every=30),
        )  # fmt: skip
        return {r.runbook for r in explained(run.run_dir).remarks}

    assert "validation-apart" in remarks(x)
    assert "validation-apart" not in remarks(blobs(600)[0])


@pytest.mark.parametrize(
    ("trained", "validated", "found"),
    [
        ([2.0] + 99 * [0.1], [1.9, 1.8, 1.9, 1.85], {"validation-apart"}),
        ([2.0] + 99 * [0.1], [1.9, 1.8, 3.9, 4.0], {"validation-apart", "overfitting"}),
        ([2.0] + 99 * [0.1], 4 * [math.inf], {"validation-apart"}),
        ([2.0] + 99 * [0.1], [1.9, 1.8, 1.9, math.nan], {"validation-apart"}),
        ([2.0] + 99 * [0.1], [1.9, 0.5, 0.4, 0.3], set()),
        ([2.0] + 99 * [1.5], [1.9, 1.8, 1.9, 1.85], set()),
        (100 * [-1.0], 4 * [-0.7], set()),
        ([0.6] + 49 * [0.0, 1.0], 4 * [0.5], set()),  # one sample each: most losses are below the mean
    ],
)
def test_training_beside_validation(trained, validated, found):
    num = len(trained)
    log = {"step": np.arange(num), "loss": np.array(trained), "permitted": np.ones(num, int)}
    events = [
        {"kind": "validated", "step": 10 * i, "metrics": {"loss": loss}} for i, loss in enumerate(validated)
    ]
    assert {remark.runbook for remark in _on_validation(log, events)} == found


class Sleepy:
    def __len__(self):
        return 128

    def __getitem__(self, i):
        time.sleep(0.0005)
        return torch.randn(8), i % 3


def test_where_the_time_went(fit, tmp_path):
    waited = fit(data=sf.Dataset(Sleepy()), until=60)
    assert "data-wait" in {r.runbook for r in explained(waited.run_dir).remarks}
    x, y = blobs(20_000)
    validated = fit(until=60, validation=sf.Validation(sf.Arrays(x, y), every=1, batch=100))
    assert "validation-cost" in {r.runbook for r in explained(validated.run_dir).remarks}


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_short_runs_and_runs_with_nothing_in_them(tmp_path, steps):
    for outcome in sf.steps(recipe(until=20), out=tmp_path / "run"):
        if outcome.step + 1 == steps:
            break
    told = explained(tmp_path / "run")
    assert "interrupted" in told.verdict
    assert told.remarks == []
    assert surefoot("explain", tmp_path / "run").returncode == 0
    assert surefoot("explain", tmp_path).returncode == 2


def test_a_run_that_diverged_says_why(tmp_path):
    x, y = blobs(256)
    x[:] = np.nan
    done = sf.fit(recipe(data=sf.Arrays(x, y), until=80, guard=sf.Guard("off")), out=tmp_path / "run")
    assert done.status == "diverged"
    assert explained(tmp_path / "run").verdict.endswith(" is not finite whatever the batch.")


# ---------------------------------------------------------------------------------- bundles


def test_an_incident_leaves_a_bundle_and_a_draft(tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_API_TOKEN", "geheim")
    monkeypatch.setenv("MY_PASSWORD", "geheim")
    monkeypatch.setenv("TORCH_HOME", "s3://me:geheim@host/x")
    monkeypatch.setenv("ELSEWHERE", "geheim")
    play(BY_NUMBER[3], 0, sf.Guard(), tmp_path / "run")
    (bundle,) = (tmp_path / "run/incidents").iterdir()
    assert bundle.name.endswith("-rolled_back")
    assert {p.name for p in bundle.iterdir()} == {"incident.json", "rows.csv", "POSTMORTEM.md"}
    about = json.loads((bundle / "incident.json").read_text())
    assert about["event"]["kind"] == "rolled_back"
    assert about["variables"]["SUREFOOT_API_TOKEN"] == "(redacted)"
    assert about["variables"]["TORCH_HOME"] == "s3://(redacted)@host/x"
    assert about["variables"]["ELSEWHERE"] == about["variables"]["MY_PASSWORD"] == "(left out)"
    draft = (bundle / "POSTMORTEM.md").read_text()
    assert "the learning rate jumped" in draft
    assert "rolled_back" in draft
    assert "geheim" not in "".join(p.read_text() for p in bundle.iterdir())
    rows = (bundle / "rows.csv").read_text().splitlines()
    assert rows[0].startswith("step,attempt,epoch")
    assert len(rows) > 400


def test_samples_go_into_it_only_if_asked_for(tmp_path):
    jumping = ROOT / "tests/recipes/jumping.py"
    for asked in ("false", "true"):
        out = tmp_path / asked
        done = surefoot("train", jumping, "--out", out, "--set", f"incidents.samples={asked}")
        assert done.returncode == 0, done.stderr
        (bundle,) = out.glob("incidents/*-rolled_back")
        assert (bundle / "samples.safetensors").exists() == (asked == "true")
    kept = load_file(bundle / "samples.safetensors")
    view = sf.open_run(out)
    steps = [t for t in range(320, 345) if np.array_equal(view.plan.ids(t), kept["ids"].numpy())]
    assert len(steps) == 1
    assert kept["data.0"].shape == (16, 12)


def test_a_failure_leaves_one(tmp_path, fit):
    calls = []

    def fails(model, data):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("postgres://me:geheim@host is gone")
        return torch.nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")

    with pytest.raises(RuntimeError):
        sf.fit(recipe(objective=fails), out=tmp_path / "run")
    (bundle,) = (tmp_path / "run/incidents").iterdir()
    assert "geheim" not in "".join(p.read_text() for p in bundle.iterdir())
    assert "class of failure: unknown" in (bundle / "POSTMORTEM.md").read_text()
    ((incident, _),) = of_kind(explained(tmp_path / "run"), "ended")
    assert incident.runbook == "crash"


def test_what_looks_like_a_secret_is_not_written():
    told = variables({"OMP_NUM_THREADS": "2", "CUDA_KEY": "x", "HOME": "/h", "PYTHONPATH": "a"})
    assert told == {
        "OMP_NUM_THREADS": "2",
        "CUDA_KEY": "(redacted)",
        "HOME": "(left out)",
        "PYTHONPATH": "a",
    }
    nested = {"lr": 0.1, "api_key": "x", "deep": [{"token": 1, "url": "http://a:b@c/d"}]}
    assert redacted("", nested) == {
        "lr": 0.1,
        "api_key": "(redacted)",
        "deep": [{"token": "(redacted)", "url": "http://(redacted)@c/d"}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "postgres://u:pa/geheim@h/db",
        "https://h/x?access_token=geheim&y=1",
        "https://h/?sig=geheim",
        "could not log in, password=geheim, twice",
        "me:geheim@host is gone",
        "used hf_geheim123",
        "API_KEY: geheim",
    ],
)
def test_secrets_within_a_text_are_redacted(text):
    assert "geheim" not in redacted("", text)
    assert (
        redacted("", "lr=0.1 at step 3:4, 50 % done; see a@b.c")
        == "lr=0.1 at step 3:4, 50 % done; see a@b.c"
    )


def test_bundles_are_left_by_what_ends_or_undoes_training():
    assert set(LEAVE_A_BUNDLE) <= set(KINDS)


# ---------------------------------------------------------------------------------- layers


def deep(activation, *, depth=16):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(8 if i == 0 else 16, 16), activation()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (lambda: deep(nn.Sigmoid), "vanishes"),
        (lambda: deep(nn.ReLU, depth=3), None),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), None),
    ],
    ids=["sigmoid", "shallow", "tanh"],
)
def test_layers_whose_gradient_vanishes_or_explodes_are_named(fit, model, how):
    done = fit(model=model, optimizer=sf.SGD(lr=1e-4), until=620)
    told = [e for e in sf.open_run(done.run_dir).events() if e["kind"] == "layer"]
    assert {e["how"] for e in told} == ({how} if how else set())
    assert len({e["layer"] for e in told}) == len(told)  # each once
    if how:
        assert "0.weight" in {e["layer"] for e in told}
        assert of_kind(explained(done.run_dir), "layer")


@pytest.mark.parametrize(
    ("rms", "told"),
    [
        ([1e-9, 1e-3, 1.0], [("a", "vanishes")]),
        ([1.0, 1e-3, 1e-9], [("a", "explodes")]),
        ([1e-9, 1e-8, 1.0], [("a", "vanishes"), ("b", "vanishes")]),
        ([0.0, 1.0, 1.0], [("a", "is zero")]),
        ([1e-5, 1.0, 1e-5], []),
        ([0.0, 0.0, 0.0], []),
    ],
)
def test_which_layers_are_sick(rms, told):
    layers = Layers()
    assert not layers.look("abc", rms)
    assert not layers.look("abc", rms)
    found = layers.look("abc", rms) or [s for _ in range(7) for s in layers.look("abc", rms)]
    assert [(s.layer, s.how) for s in found] == told


def test_what_was_told_of_layers_survives_a_stop():
    names, sick = ["a", "b"], [1e-12, 1.0]
    first = Layers()
    assert not first.look(names, sick)
    assert not first.look(names, sick)
    second = Layers()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [s.layer for s in second.look(names, sick)] == ["a"]
    assert not second.look(names, sick)
    assert not second.look(names, [float("nan"), 1.0])


# ---------------------------------------------------------------------------------- release


def test_released_samples_take_part_again(tmp_path):
    """Half of the run without them, then with them: as if they had been let in by the plan."""
    scenario = BY_NUMBER[4]
    recipe_ = scenario.recipe(0, sf.Guard())
    for outcome in sf.steps(recipe_, out=tmp_path / "run"):
        if outcome.step == 700:
            break
    out = sf.open_run(tmp_path / "run").summary()["quarantined"]
    assert len(out) == 7
    done = surefoot("release", tmp_path / "run", out[0], out[1])
    assert done.returncode == 0, done.stderr
    assert "step 701" in done.stdout
    view = sf.open_run(tmp_path / "run")
    assert view.summary()["quarantined"] == out[2:]
    assert view.status == "preempted"
    assert view.verify() == []
    finished = sf.fit(recipe_, out=tmp_path / "run")
    assert finished.status == "finished"
    assert sf.open_run(tmp_path / "run").verify() == []
    assert [i for i, _ in of_kind(explained(tmp_path / "run"), "released")]
    assert sf.replay_step(recipe_, tmp_path / "run", step=900).verdict == "reproduced"


def test_a_release_that_is_gone_is_noticed_and_one_that_was_cut_short_does_no_harm(tmp_path):
    """The checkpoint with the release was written, the event not; or told of, and lost."""
    recipe_ = BY_NUMBER[4].recipe(0, sf.Guard())
    often = sf.Operations(checkpoint={"every": 50})
    for outcome in sf.steps(recipe_, out=tmp_path / "run", operations=often):
        if outcome.step == 330:
            copied(tmp_path / "run", tmp_path / "killed", step=300)
            break
    told = (tmp_path / "killed/events.jsonl").read_bytes()
    assert surefoot("release", tmp_path / "killed", "--all").returncode == 0
    refused = surefoot("release", tmp_path / "killed", "--all")
    assert refused.returncode == 2
    with pytest.raises(sf.RunDirectoryError, match="not continued"):
        sf.replay_step(recipe_, tmp_path / "killed", step=320)
    shutil.copytree(tmp_path / "killed", tmp_path / "lost")
    shutil.rmtree(sorted((tmp_path / "lost/checkpoints").glob("0*[0-9]"))[-1])
    assert sf.open_run(tmp_path / "lost").verify() != []
    (tmp_path / "killed/events.jsonl").write_bytes(told)
    done = sf.fit(recipe_, out=tmp_path / "killed", operations=often)
    assert done.status == "finished"
    assert "rolled_back" not in {
        e["kind"] for e in sf.open_run(tmp_path / "killed").events(all_events=True)
    }


def test_what_cannot_be_released(tmp_path, fit):
    assert surefoot("release", fit().run_dir, "--all").returncode == 2  # it has ended
    for outcome in sf.steps(recipe(until=30), out=tmp_path / "run"):
        if outcome.step == 5:
            assert surefoot("release", tmp_path / "run", "--all").returncode == 2  # it is going on
            break
    before = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    for arguments, says in (
        [["3"], "not left out"],
        [["--all"], "no sample is left out"],
        [[], "which samples"],
    ):
        done = surefoot("release", tmp_path / "run", *arguments)
        assert done.returncode == 2
        assert says in done.stderr
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == before
    assert surefoot("release", tmp_path / "nowhere", "--all").returncode == 2
