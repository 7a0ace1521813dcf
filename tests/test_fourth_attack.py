"""What an attack on healing found: each of these went wrong once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, recipe
from scenarios import accuracy, base, mixture, spoiling
from torch import nn

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.course import replay
from surefoot.guard.history import History, Intervention
from surefoot.operations import Operations
from surefoot.record.events import event_lineage
from surefoot.record.folder import RunFolder


def nan(x, y, ids):
    x[ids] = np.nan


def one_nan(x, y, ids):
    x[ids[0], 3] = np.nan


def events(run, kind):
    return [e for e in sf.open_run(run).events(all_events=True) if e["kind"] == kind]


def keep(every, **more):
    return Operations(progress="off", checkpoint={"every": every}, **more)


def stopped_and_continued(changed, out, stop, **more):
    for outcome in sf.steps(changed(), out=out, operations=keep(450)):
        if outcome.step == stop:
            break
    return sf.fit(changed(), out=out, operations=keep(450, **more))


JUMP = sf.constant(over=500) >> sf.constant(over=3) * 300.0 >> sf.cosine(to=0.1)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: base(
            0,
            sf.Guard(),
            steps=700,
            schedule=sf.warmup(over=500) * 0.02 >> sf.constant(over=3) * 300.0 >> sf.cosine(to=0.1),
        ),
        lambda: base(
            0,
            sf.Guard(max_quarantined=1e-6),
            steps=700,
            spoil=spoiling(range(300, 356, 7), one_nan),
            schedule=JUMP,
        ),
    ],
    ids=["slow at first", "quarantine is full"],
)
def test_a_resumed_run_makes_the_state_it_goes_back_to_again(tmp_path, changed):
    """No checkpoint is old enough: the replay begins at the first step, and passes what was answered."""
    whole = sf.fit(changed(), out=tmp_path / "whole", operations=keep(450))
    parts = stopped_and_continued(changed, tmp_path / "parts", 470)
    assert whole.status == "finished"
    assert events(tmp_path / "whole", "rolled_back")
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert sf.open_run(tmp_path / "parts").verify() == []


def test_a_validation_at_the_step_of_an_alarm_is_made(tmp_path):
    def changed():
        validation = sf.Validation(
            sf.Arrays(*mixture(1, 500)), metrics={"accuracy": accuracy}, every=64, batch=500
        )
        return base(
            0,
            sf.Guard(),
            steps=300,
            optimizer=sf.SGD(lr=5e-5),
            schedule=sf.plateau(patience=1, mode="max"),
            validation=validation,
        )

    whole = sf.fit(changed(), out=tmp_path / "whole")
    assert [e["step"] for e in events(tmp_path / "whole", "validated")] == [64, 128, 192, 256, 300]
    assert [e["detector"] for e in events(tmp_path / "whole", "alarm")] == ["D6"]
    parts = stopped_and_continued(changed, tmp_path / "parts", 191)
    assert parts.digest == whole.digest


def test_a_replay_notes_what_was_looked_into(tmp_path):
    """Or the same suspicion would be raised again after it."""
    slow = base(0, sf.Guard(), steps=300, optimizer=sf.SGD(lr=5e-5))
    first, second = (build(slow, RunFolder(tmp_path / name), keep(450)) for name in ("first", "second"))
    for _ in run_steps(first):
        pass
    assert [e["detector"] for e in events(tmp_path / "first", "alarm")] == ["D6"]
    assert replay(second.run, 300, [], known=True) is None
    assert second.run.parts.guard.reviewed == first.run.parts.guard.reviewed
    assert second.run.parts.guard.reviewed.told_slow


def test_an_alarm_in_the_last_step_does_not_cost_the_last_validation(tmp_path):
    done = sf.fit(base(0, sf.Guard(), steps=192, schedule=sf.constant() * 1e-4), out=tmp_path / "run")
    assert done.status == "finished"
    assert set(done.metrics) == {"loss", "accuracy"}


def test_noise_is_no_reason_to_cut_the_rate(tmp_path):
    def zeros():
        model = nn.Linear(8, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    for seed in (12, 13, 14):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(400, 8)).astype("f4"), rng.normal(size=(400, 1)).astype("f4")
        changed = recipe(
            model=zeros,
            data=sf.Arrays(x, y),
            objective=sf.supervised(F.mse_loss),
            optimizer=sf.SGD(lr=0.02),
            batch=sf.Batch(2),
            until=400,
            seed=seed,
        )
        done = sf.fit(changed, out=tmp_path / str(seed))
        assert (done.status, done.interventions) == ("finished", 0)


def test_a_model_that_begins_near_its_optimum_may_stay_there(tmp_path):
    x, y = blobs(512)

    def tuned():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimizer.step()
        return model

    changed = recipe(
        model=tuned, data=sf.Arrays(x, y), batch=sf.Batch(64, micro=4), optimizer=sf.SGD(lr=1e-4), until=300
    )
    assert sf.fit(changed, out=tmp_path / "run").status == "finished"


@pytest.mark.parametrize("first", [0, 5])
def test_data_that_are_broken_to_the_end_end_the_run_with_a_reason(tmp_path, first):
    changed = base(0, sf.Guard(), steps=30, size=8, spoil=spoiling(range(first, 30), nan))
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.status in ("diverged", "finished")
    if done.status == "diverged":
        assert "did not help" in sf.open_run(tmp_path / "run").summary()["reason"]


def test_other_operations_are_no_mistake_of_the_machine(tmp_path):
    def changed():
        return base(0, sf.Guard(), steps=600, schedule=JUMP)

    done = stopped_and_continued(changed, tmp_path / "run", 490, compute={"micro_batch": 16})
    assert done.status == "finished"
    assert [e["cause"] for e in events(tmp_path / "run", "rolled_back")] == ["the learning rate jumped"]


def test_what_is_sat_out_is_nobodys_fault_and_no_overflow(tmp_path):
    changed = base(0, sf.Guard(), steps=400, size=16, spoil=spoiling(range(5, 40), nan), precision="fp16")
    done = sf.fit(changed, out=tmp_path / "run")
    log = sf.open_run(done.run_dir).log()
    sat_out = log["step"][log["verdict"] == 4]
    assert not {e["step"] for e in events(done.run_dir, "quarantined")} & set(sat_out.tolist())
    finite = np.isfinite(log["loss"]) & np.isfinite(log["grad_norm"])
    assert (np.diff(log["loss_scale"])[finite[:-1]] >= 0).all()


def test_successive_samples_that_are_not_finite_are_left_out_without_going_back(tmp_path):
    changed = base(0, sf.Guard(), steps=100, spoil=spoiling(range(3, 10), one_nan))
    done = sf.fit(changed, out=tmp_path / "run")
    assert not events(done.run_dir, "rolled_back")
    assert len(sf.open_run(done.run_dir).summary()["quarantined"]) == 7


def test_a_batch_of_nothing_but_quarantined_samples_does_no_harm(tmp_path):
    x, y = blobs(64)
    x[:2] = np.nan
    changed = recipe(data=sf.Arrays(x, y), batch=sf.Batch(2, shuffle=False), until="4ep")
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.status == "finished"
    assert all(torch.isfinite(v).all() for v in done.model.state_dict().values())


def test_events_of_a_forgotten_lineage_do_not_come_back():
    """The count that orders them never goes down, though a rollback forgets quarantines."""
    found = History().with_(Intervention("quarantine", 9, 8, 0.0, (1,)))
    back = found.back_to(0, 10, forget=5)
    assert (len(back.interventions), back.num_decided) == (1, 2)
    kept = event_lineage(
        [
            {"kind": "quarantined", "step": 8, "interventions": 1},
            {"kind": "rolled_back", "step": 0, "interventions": 2},
            {"kind": "resumed", "step": 9, "interventions": 1},
        ]
    )
    assert [e["kind"] for e in kept] == ["quarantined", "resumed"]
