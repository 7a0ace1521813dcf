"""Samples that ruin the running statistics of batch norm, and show in neither loss nor gradient."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import blobs, recipe
from hypothesis import example, given
from hypothesis import strategies as st
from scenarios import base, batch_normed, mixture, spoiling
from torch import nn

import surefoot as sf
from surefoot.guard.detect import FINE, MOST_GROWTH, NOT_FINITE, STATISTICS_SPIKE
from surefoot.guard.history import History, Intervention
from surefoot.guard.judge import Judge
from surefoot.guard.watch import Watch
from surefoot.measure.readings import Readings
from surefoot.optim.buffers import Buffers
from surefoot.optim.statistics import growth

EAGER = sf.Operations(compute={"compile": "off"}, progress="off")
COMPILED = sf.Operations(compute={"compile": "on"}, progress="off")


def events(run, kind):
    return [e for e in sf.open_run(run).events(all_events=True) if e["kind"] == kind]


def normed_inputs():
    return nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def convolving():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


MODELS = {"mlp": batch_normed, "inputs": normed_inputs, "cnn": convolving}
SGD, ADAM = sf.SGD(lr=0.05, momentum=0.9), sf.AdamW(lr=1e-2)
HERE = {("mlp", "adam", 1e2, 0), ("inputs", "sgd", 1e4, 1), ("cnn", "adam", 1e2, 2), ("cnn", "sgd", 1e4, 7)}


def cases(here):
    """Models, optimizers, scales and seeds: some here, the others in `make soak`."""
    every = itertools.product(MODELS, ("sgd", "adam"), (1e2, 1e4), (0, 1, 2, 7))
    return [case if case in here else pytest.param(*case, marks=pytest.mark.soak) for case in every]


@pytest.mark.parametrize(("model", "optimizer", "scale", "seed"), cases(HERE))
def test_bad_samples_are_named_and_no_others(tmp_path, model, optimizer, scale, seed):
    """20 of 5,000: not a number; far too large. Of each other one is in most batches of eight."""

    def trained(x, name):
        changed = base(seed, sf.Guard(), model=MODELS[model])
        fields = {name: getattr(changed, name) for name in changed.__dataclass_fields__}
        fields |= {"data": sf.Arrays(x, y), "until": "10ep", "schedule": sf.cosine()}
        return sf.fit(
            sf.Recipe(**(fields | {"optimizer": SGD if optimizer == "sgd" else ADAM})), out=tmp_path / name
        )

    x, y = mixture(7 + seed, 5000)
    calm = trained(x, "clean")
    assert sf.open_run(calm.run_dir).summary()["quarantined"] == []
    bad = np.random.default_rng(seed).permutation(5000)[:20]
    x = x.copy()
    x[bad[:10], 3] = np.nan
    x[bad[10:]] *= scale
    done = trained(x, "run")
    found = set(sf.open_run(done.run_dir).summary()["quarantined"])
    assert found == set(bad.tolist())
    assert done.status == "finished"
    assert done.metrics["accuracy"] >= 0.99 * calm.metrics["accuracy"]
    assert sf.open_run(done.run_dir).verify() == []


def large(x, y, ids):
    x[ids[5]] *= 100.0


def hidden(x, y, ids):
    x[ids[5], 31] *= 1e5  # which the loss hardly shows


def test_a_compiled_step_sees_itself_what_the_loss_hardly_shows(tmp_path):
    steps = range(90, 400, 50)
    changed = base(0, sf.Guard(), model=normed_inputs, steps=400, spoil=spoiling(steps, hidden))
    done = sf.fit(changed, out=tmp_path / "run", operations=COMPILED)
    view = sf.open_run(done.run_dir)
    assert view.identity["environment"]["compiled"] == "step"
    assert (view.log()["verdict"] == STATISTICS_SPIKE).nonzero()[0].tolist() == list(steps)
    assert done.model[0].running_var[31] < 2.0


def test_eager_and_compiled_steps_refuse_the_same(tmp_path):
    runs = []
    for operations in (EAGER, COMPILED):
        changed = base(
            0, sf.Guard(), model=batch_normed, steps=400, spoil=spoiling(range(90, 400, 50), large)
        )
        runs.append(sf.fit(changed, out=tmp_path / str(len(runs)), operations=operations))
    eager, compiled = (sf.open_run(done.run_dir) for done in runs)
    refused = np.flatnonzero(~eager.log()["permitted"].astype(bool)).tolist()
    assert refused == list(range(90, 400, 50))
    for view in (eager, compiled):
        log = view.log()
        assert (log["verdict"] == STATISTICS_SPIKE).nonzero()[0].tolist() == refused
        assert (log["permitted"] == 0).nonzero()[0].tolist() == refused
        told = events(view.path, "skipped")[0]
        assert "batch norm '1' would have become more than 4 times" in told["reason"]
        assert told["growth"] > 10
    assert eager.summary()["quarantined"] == compiled.summary()["quarantined"]
    for one, other in zip(runs[0].model.buffers(), runs[1].model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)  # rounding, grown in 400 steps
    assert compiled.identity["environment"]["compiled"] == "step"
    assert not events(compiled.path, "uncompiled")


def test_it_is_only_told_of_if_the_run_is_watched(tmp_path):
    changed = base(
        0, sf.Guard("watch"), model=batch_normed, steps=200, spoil=spoiling(range(90, 91), large)
    )
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    log = sf.open_run(done.run_dir).log()
    assert log["verdict"][90] == STATISTICS_SPIKE
    assert log["permitted"].all()
    assert [e["step"] for e in events(done.run_dir, "would_skip")] == [90]


def test_where_all_data_change_for_good_the_run_goes_on(tmp_path):
    """Other units from step 600 on: what is usual is learned anew."""

    def other_units(x, y, ids):
        x[ids] *= 1000.0

    changed = base(
        0, sf.Guard(), model=normed_inputs, spoil=spoiling(range(600, 1200), other_units), validation=None
    )
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    (borne,) = events(done.run_dir, "borne")
    assert (borne["step"], borne["detector"]) == (607, "statistics spike")
    assert "Until step 707 " in borne["reason"]
    assert not events(done.run_dir, "rolled_back")
    log = sf.open_run(done.run_dir).log()
    assert (log["permitted"] == 0).nonzero()[0].tolist() == list(range(600, 607))
    assert done.model[0].running_var.mean() > 1e5


def test_steps_on_their_way_when_statistics_are_let_grow_are_nobodys_fault(tmp_path, monkeypatch):
    """On a GPU a step's numbers arrive eight steps later."""
    begin = Readings.__init__
    monkeypatch.setattr(Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", 8))

    def other_units(x, y, ids):
        x[ids] *= 1000.0

    spoil = spoiling(range(200, 400), other_units)
    changed = base(0, sf.Guard(), model=normed_inputs, steps=400, spoil=spoil, validation=None)
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    view = sf.open_run(done.run_dir)
    assert view.summary()["quarantined"] == []
    assert [e["step"] for e in events(done.run_dir, "borne")] == [215]
    assert (view.log()["permitted"] == 0).nonzero()[0].tolist() == list(range(200, 215))
    assert not events(done.run_dir, "rolled_back")


@pytest.mark.parametrize("micro", [64, 8])
def test_a_bad_sample_among_calm_ones_is_named_whatever_the_micro_batches(tmp_path, micro):
    def calm_but_for_one(x, y, ids):
        x[ids] *= 0.5
        x[ids[5]] *= 2e4

    changed = base(
        0, sf.Guard(), model=normed_inputs, steps=200, batch=sf.Batch(64, micro=micro),
        spoil=spoiling(range(150, 151), calm_but_for_one), validation=None,
    )  # fmt: skip
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    assert len(sf.open_run(done.run_dir).summary()["quarantined"]) == 1
    assert not events(done.run_dir, "borne")


def test_going_back_by_taking_steps_again_is_as_going_back_to_a_kept_state(tmp_path, monkeypatch):
    """Samples are named in seven of the steps before 400, and the eighth refused is nobody's fault."""

    def spoil(x, y, plan):
        for step in range(385, 399, 2):
            x[plan.ids(step)[5]] *= 100.0
        x[plan.ids(401)] *= 1000.0

    schedule = sf.constant(over=500) >> sf.constant(over=40) * 300.0 >> sf.constant()
    changed = base(0, sf.Guard(), model=normed_inputs, steps=700, spoil=spoil, schedule=schedule)
    kept = sf.fit(changed, out=tmp_path / "kept", operations=EAGER)
    (back,) = events(kept.run_dir, "rolled_back")
    assert back["step"] == 400
    monkeypatch.setattr("surefoot.heal._MEMORY_SHARE", 0.0)
    operations = EAGER.model_copy(
        update={"checkpoint": sf.Operations(checkpoint={"every": 350}).checkpoint}
    )
    again = sf.fit(changed, out=tmp_path / "again", operations=operations)
    assert (again.digest, again.ledger) == (kept.digest, kept.ledger)
    one, other = (
        [(e["kind"], e["step"]) for e in sf.open_run(run.run_dir).events() if e["kind"] in told]
        for told in [("skipped", "quarantined", "rolled_back", "borne")]
        for run in (kept, again)
    )
    assert one == other


def test_what_was_let_grow_when_all_went_wrong_is_forgotten():
    history = History().with_(Intervention("grow", 101, 100, 201.0), Intervention("grow", 301, 300, 501.0))
    back = history.back_to(200, 350, forget=250)
    assert [i.at for i in back.interventions if i.kind == "grow"] == [100]
    assert back.lets_grow(150)
    assert not back.lets_grow(400)


@pytest.mark.parametrize("operations", [EAGER, COMPILED])
def test_a_run_interrupted_where_data_change_is_alike_to_the_bit(tmp_path, operations):
    def other_units(x, y, ids):
        x[ids] *= 1000.0

    spoil = spoiling(range(300, 400), other_units)
    changed = base(0, sf.Guard(), model=batch_normed, steps=450, spoil=spoil, validation=None)
    whole = sf.fit(changed, out=tmp_path / "whole", operations=operations)
    for stop in (301, 304, 306, 307, 309, 406, 407):
        bounded = operations.model_copy(update={"budget": sf.Operations(budget={"updates": stop}).budget})
        sf.fit(changed, out=tmp_path / "run", operations=bounded)
    done = sf.fit(changed, out=tmp_path / "run", operations=operations)
    assert (done.digest, done.ledger) == (whole.digest, whole.ledger)
    one, other = (sf.open_run(run.run_dir) for run in (whole, done))
    assert events(other.path, "borne")
    for name in ("loss", "grad_norm", "verdict", "permitted"):
        assert np.array_equal(one.log()[name], other.log()[name]), name


def test_where_they_were_let_grow_they_are_looked_at_again(tmp_path):
    """In a compiled run, too, in which steps are settled by blocks of 32."""

    def spoil(x, y, plan):
        for step in range(300, 450):
            ids = plan.ids(step)
            x[ids] *= 1000.0
            if step in (360, 415):
                x[ids[5], 31] *= 1e5  # which the loss hardly shows

    changed = base(0, sf.Guard(), model=normed_inputs, steps=450, spoil=spoil, validation=None)
    for operations in (EAGER, COMPILED):
        done = sf.fit(changed, out=tmp_path / f"{operations.compute.compile}", operations=operations)
        log = sf.open_run(done.run_dir).log()
        assert "Until step 407 " in events(done.run_dir, "borne")[0]["reason"]
        assert (log["verdict"] == STATISTICS_SPIKE).nonzero()[0].tolist() == [*range(300, 307), 415]


def dense(x, y, ids):
    x[ids[5]] *= 1e4


def test_steps_whose_samples_are_named_do_not_count_as_a_run_that_goes_wrong(tmp_path):
    """One in every second batch: eight of twenty updates are refused, and more."""
    spoil = spoiling(range(201, 280, 2), dense)
    done = sf.fit(
        base(0, sf.Guard(), model=normed_inputs, steps=300, spoil=spoil),
        out=tmp_path / "run",
        operations=EAGER,
    )
    view = sf.open_run(done.run_dir)
    assert (view.log()["permitted"] == 0).nonzero()[0].tolist() == list(range(201, 280, 2))
    assert len(view.summary()["quarantined"]) == 40
    kinds = {e["kind"] for e in view.events(all_events=True)}
    assert not {"borne", "rolled_back", "diverged"} & kinds


class Branch(nn.Module):
    """A norm of inputs that are nearly always zero."""

    def __init__(self):
        super().__init__()
        self.often, self.rare, self.head = nn.Linear(24, 32), nn.BatchNorm1d(8), nn.Linear(40, 10)

    def forward(self, x):
        return self.head(torch.cat([torch.relu(self.often(x[:, :24])), self.rare(x[:, 24:])], 1))


def test_samples_that_a_layer_is_there_for_are_not_to_blame(tmp_path):
    x, y = mixture(5, 64 * 400)
    x[:, 24:] *= (np.arange(len(x)) % 2003 == 700)[:, None]
    changed = base(0, sf.Guard(), model=Branch, steps=400, data=sf.Arrays(x, y), validation=None)
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    view = sf.open_run(done.run_dir)
    assert view.summary()["quarantined"] == []
    refused = view.log()["permitted"] == 0
    assert 1 <= refused.sum() <= 3  # of thirteen; for 100 steps after it, then for 200, none
    assert "it is there for them" in events(done.run_dir, "borne")[0]["reason"]
    assert not events(done.run_dir, "rolled_back")


def test_growth_that_an_update_has_caused_does_not_end_a_run(tmp_path):
    """The statistics turn over in each step, and the first update at this rate changes what they are of."""

    def wide():
        return nn.Sequential(
            nn.Linear(32, 512), nn.BatchNorm1d(512, momentum=1.0), nn.ReLU(), nn.Linear(512, 512),
            nn.BatchNorm1d(512, momentum=1.0), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip

    changed = base(0, sf.Guard(), model=wide, optimizer=sf.Adam(lr=3e-2), steps=100)
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    assert 1 <= len(events(done.run_dir, "skipped")) <= 7
    assert events(done.run_dir, "borne")
    assert not events(done.run_dir, "rolled_back")
    assert sf.open_run(done.run_dir).summary()["quarantined"] == []


class Domains(nn.BatchNorm1d):
    """Statistics of each of two domains."""

    def __init__(self):
        super().__init__(8)
        self.running_mean, self.running_var = torch.zeros(2, 8), torch.ones(2, 8)

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean[0], self.running_var[0], training=self.training
        )


def ruined():
    norm = nn.BatchNorm1d(8)
    norm.running_var[3] = math.nan
    return norm


@pytest.mark.parametrize(
    ("norm", "scale", "dtype"),
    [(Domains, 1.0, torch.float32), (ruined, 1.0, torch.float32), (nn.BatchNorm1d, 2e30, torch.float64)],
)
def test_statistics_of_other_kinds(tmp_path, norm, scale, dtype):
    """Each is nothing to refuse a step for."""
    x, y = blobs(320)
    changed = recipe(
        model=lambda: nn.Sequential(norm(8) if norm is nn.BatchNorm1d else norm(), nn.Linear(8, 3)).to(
            dtype
        ),
        data=sf.Arrays(torch.tensor(x).to(dtype) * scale, y),
        until="3ep",
    )
    done = sf.fit(changed, out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    assert sf.open_run(done.run_dir).log()["permitted"].all()


class Aside(nn.Module):
    """Keeps statistics of what its output does not depend on."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            self.norm(x)
        return self.head(x.clamp(-10, 10))


@pytest.mark.parametrize("at", [0, 3, 100])
@pytest.mark.parametrize("operations", [EAGER, COMPILED])
def test_statistics_that_would_be_infinite_are_kept_out_in_any_step(tmp_path, at, operations):
    """Loss and gradient are as ever; nothing would ever make these statistics finite again."""
    x, y = blobs(150 * 32)
    x[at * 32 + 7] = 1e30
    changed = recipe(
        model=Aside, data=sf.Arrays(x, y), batch=sf.Batch(32, shuffle=False), optimizer=sf.SGD(lr=0.01)
    )
    done = sf.fit(changed, out=tmp_path / "run", operations=operations)
    assert torch.isfinite(done.model.norm.running_var).all()
    view = sf.open_run(done.run_dir)
    assert view.identity["environment"]["compiled"] == ("step" if operations is COMPILED else "")
    assert view.summary()["quarantined"] == [at * 32 + 7]
    assert view.log()["verdict"][at] == (
        STATISTICS_SPIKE if at else FINE
    )  # before the first it is left out
    assert np.isfinite(view.log()["loss"]).all()


# ---------------------------------------------------------------------------------- what is measured

OTHERS = {
    "momentum 0.01": lambda: nn.BatchNorm1d(8, momentum=0.01),
    "mean of all": lambda: nn.BatchNorm1d(8, momentum=None),
    "half": lambda: nn.BatchNorm1d(8).half(),
    "double": lambda: nn.BatchNorm1d(8).double(),
}


def grown(buffers, model, batch, *, permitted=True):
    buffers.remember()
    dtype = next(b.dtype for b in model.buffers() if b.is_floating_point())
    model(batch.to(dtype))
    found = buffers.growth(on_host=True)
    kept, live = (list(map(at, buffers.statistics)) for at in (buffers._kept.__getitem__, buffers._live))
    on_device = growth(kept, live, buffers.settings()).item()
    buffers.settle(torch.tensor(permitted), on_host=True)
    rel = 1e-4
    for one, variance, num in zip(buffers._settings, kept[1::3], kept[2::3], strict=True):
        left = one.begun * one.keeps ** num.item()  # taken off in single precision on a device
        floor = (one.least + left * one.lost) / len(variance)
        rel += 4e-7 * left / (floor + abs(variance.double().mean().item() - left))
    assert found == pytest.approx(on_device, rel=rel, abs=1e-6, nan_ok=True)
    return found


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (100.0, 0.0), (1.0, 100.0), (0.01, 0.0)])
def test_neither_units_nor_momentum_matter(name, scale, offset):
    torch.manual_seed(0)
    model = OTHERS[name]()
    buffers = Buffers(model, rows=64)

    def batch():
        return torch.randn(64, 8) * scale + offset

    assert grown(buffers, model, batch()) == 0.0
    for _ in range(1500):
        assert grown(buffers, model, batch()) < 1.5
    wild = batch()
    wild[3] = (wild[3] - offset) * 3000.0 + offset
    kept = copy.deepcopy(list(model.buffers()))
    assert not grown(buffers, model, wild, permitted=False) <= MOST_GROWTH  # half becomes infinite
    assert all(torch.equal(a, b) for a, b in zip(kept, model.buffers(), strict=True))
    assert grown(buffers, model, batch()) < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_little_beside_what_a_layer_was_made_with_is_not_taken_for_growth(seed):
    """Of 0.9 to some power in single precision no variance of 1e-8 can be taken off."""
    torch.manual_seed(seed)
    model = nn.BatchNorm1d(16, eps=1e-12)
    buffers = Buffers(model, rows=64)
    for _ in range(300):
        assert grown(buffers, model, torch.randn(64, 16) * 1e-4) < 2.0


def test_a_batch_that_is_shifted_as_a_whole():
    """Its variance is as ever."""
    torch.manual_seed(0)
    model = nn.BatchNorm1d(8)
    buffers = Buffers(model, rows=64)
    for _ in range(50):
        grown(buffers, model, torch.randn(64, 8))
    assert grown(buffers, model, torch.randn(64, 8) + 1e3) > 1000.0


def test_of_several_layers_the_one_that_grows_most():
    torch.manual_seed(0)
    forgets, counts_none = nn.BatchNorm1d(8, track_running_stats=False), nn.BatchNorm1d(8)
    counts_none.num_batches_tracked = None
    model = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8), forgets, counts_none])
    buffers = Buffers(model, rows=64)
    assert len(buffers.statistics) == 2 * 3
    for wild in (-1, 0, 1, 2, 3):
        buffers.remember()
        for i, layer in enumerate(model):
            for _ in range(50):
                layer(torch.randn(64, 8) * (1e3 if i == wild else 1.0))
        found = buffers.growth(on_host=True)
        buffers.settle(torch.tensor(wild < 0), on_host=True)
        assert (found > 1e3) == (wild in (0, 1))


def test_only_samples_found_after_a_step_are_to_blame_for_it():
    after = Intervention("quarantine", 8, 7, 0.0, (3,))
    assert History((after,)).blamed(7)
    assert not History((after._replace(begins=7),)).blamed(7)  # left out at once


def test_there_is_nothing_to_measure_without_running_statistics():
    assert Buffers(nn.Linear(2, 2), rows=64).growth(on_host=True) is None
    frozen = nn.BatchNorm1d(8).eval()
    assert grown(Buffers(frozen, rows=64), frozen, torch.randn(64, 8) * 1e6) <= 1.0


anything = st.one_of(st.floats(0, 20), st.sampled_from([MOST_GROWTH, math.inf, math.nan, 1e30]))


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.1, math.nan, 1e9]), anything), min_size=1, max_size=90),
    st.sampled_from(["heal", "watch", "off"]),
    st.booleans(),
)
@example([(1.0, 1.0)] * 20 + [(1.0, 19.0)], "heal", True)
@example([(1.0, math.inf)], "heal", False)
def test_a_device_decides_as_a_host_does(rows, mode, anew):
    """What runs on a GPU, run on the CPU."""
    here, there = (Watch(sf.Guard(mode), torch.device("cpu")) for _ in range(2))
    there.judge = Judge(torch.device("cpu"), on_host=False)
    for step, (loss, grown) in enumerate(rows):
        if anew and step == 20:
            for watch in (here, there):
                watch.history = watch.history.with_(Intervention("anew", step, step))
        if step == 20 and anew and mode != "off":
            there.judge = Judge(torch.device("cpu"), on_host=False)
        loss, norm = (torch.tensor(v, dtype=torch.float64) for v in (loss, 1.0))
        tensor = torch.tensor(grown, dtype=torch.float32)
        a = here.permit(loss, norm, grown, step=step, scaled=False)
        there._begin_anew = lambda step: None  # it would take a judge of the host
        b = there.permit(loss, norm, tensor, step=step, scaled=False)
        assert (a.permitted.item(), a.verdict) == (b.permitted.item(), float(b.verdict))
        first = step == 0 or (anew and step == 20)
        fits = grown < math.inf if first else grown <= MOST_GROWTH
        if mode == "off":
            assert (a.permitted.item(), a.verdict) == (True, 0)
        elif math.isnan(loss):
            assert a.verdict == NOT_FINITE
        elif loss < 2.0:
            assert (a.verdict == STATISTICS_SPIKE) == (not fits)
            assert a.permitted.item() == (fits or mode == "watch")
