"""The compiled step equals the eager one to rounding, and itself to the bit however it is interrupted."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, blobs, flat, surefoot
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

import surefoot as sf
from surefoot import calm, clock, course, heal, train
from surefoot.api import result, run_steps
from surefoot.build import build
from surefoot.compiled import Compiled
from surefoot.heal import EVERY, SELDOM
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.stopping import Budget
from surefoot.unchanged import Unchanged

COMPILED = Operations(compute={"compile": "on"}, checkpoint={"every": 7}, progress="off")
EAGER = Operations(compute={"compile": "off"}, progress="off")
CE = sf.supervised(F.cross_entropy)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def large():
    return nn.Sequential(nn.Linear(8, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 3))


class Tied(nn.Module):
    """Two layers share a weight, one is frozen, and one is never used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight
        self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.out(self.b(torch.tanh(self.frozen(self.a(x)))))


class Attending(nn.Module):
    """Attention between the features, in training with dropout."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 12), nn.Linear(32, 3)

    def forward(self, x):
        q, k, v = self.inner(x[:, None, :, None]).split(4, dim=-1)
        return self.outer(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).flatten(1))


class Branching(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x if x.sum().item() > 0 else -x)


class Broken(nn.Module):
    """Of two graphs, by torch's lights."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        hidden = self.layers[:2](x)
        torch._dynamo.graph_break()
        return self.layers[2](hidden)


def weighted(model, data):
    x, y = data
    return F.cross_entropy(model(x), y, reduction="none"), 1.0 + (y == 0).float()


class Weighing:
    def __call__(self, model, data):
        return weighted(model, data)

    def weigh(self, data):
        return 1.0 + (data[1] == 0).float()


def recipe(**changes):
    settings = {
        "model": mlp, "data": sf.Arrays(*blobs(200, classes=3)), "objective": CE,
        "optimizer": sf.SGD(lr=0.05, momentum=0.9), "schedule": sf.warmup(5) >> sf.cosine(),
        "batch": sf.Batch(20), "gradient": (sf.clip_norm(1.0),), "until": 30,
    }  # fmt: skip
    return sf.Recipe(**(settings | changes))


OPTIMIZERS = {
    "sgd": sf.SGD(lr=0.05),
    "momentum": sf.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": sf.Adam(lr=1e-3, weight_decay=1e-2),
    "amsgrad": sf.Adam(lr=1e-3, amsgrad=True),
    "adamw": sf.AdamW(lr=1e-3),
    "fused adamw": sf.AdamW(lr=1e-3, fused=True),
    "nadamw": sf.NAdamW(lr=1e-3),
    "rmsprop": sf.RMSprop(lr=1e-3, momentum=0.9, centered=True),
    "adagrad": sf.Adagrad(lr=1e-2),
    "adadelta": sf.Adadelta(lr=0.5),
}
CASES = {
    **{f"optimizer {name}": {"optimizer": spec} for name, spec in OPTIMIZERS.items()},
    "clip value": {"gradient": (sf.clip_value(0.01), sf.clip_norm(0.05))},
    "no transform": {"gradient": ()},
    "bf16": {"precision": "bf16"},
    "bf16 attention": {"model": Attending, "precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "batch norm and dropout": {"model": Normed},
    "tied, frozen, unused": {"model": Tied, "optimizer": sf.AdamW(lr=1e-3)},
    "float64": {
        "model": lambda: mlp().double(),
        "data": sf.Arrays(blobs(200, classes=3)[0].astype("float64"), blobs(200, classes=3)[1]),
    },
    "accumulation": {"batch": sf.Batch(20, micro=8)},
    "accumulation with dropout": {"batch": sf.Batch(20, micro=10), "model": Normed},
    "weights": {"objective": weighted},
    "weights known before, accumulated": {"objective": Weighing(), "batch": sf.Batch(20, micro=8)},
    "groups": {"groups": (sf.Group("0.*", lr=0.1),)},
    "guard off": {"guard": sf.Guard("off")},
    "watched": {"guard": sf.Guard("watch")},
    "a short last batch": {"data": sf.Arrays(*blobs(195, classes=3))},
}


def run(changed, out, operations):
    built = build(changed, RunFolder(out), operations)
    for _ in run_steps(built):
        pass
    return result(built), built


QUICK = (
    "optimizer momentum", "optimizer adamw", "clip value", "bf16", "bf16 attention",
    "batch norm and dropout", "tied, frozen, unused", "accumulation with dropout", "weights",
    "a short last batch",
)  # fmt: skip
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in CASES]


@pytest.mark.parametrize("name", ALL)
def test_it_equals_the_eager_step_to_rounding(name, tmp_path):
    changed = recipe(**CASES[name])
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    compiled, _ = run(changed, tmp_path / "compiled", COMPILED)
    view = sf.open_run(tmp_path / "compiled")
    assert view.identity["environment"]["compiled"] == "step"
    loose = "16" in name
    torch.testing.assert_close(
        flat(compiled.model), flat(eager.model), rtol=2e-2 if loose else 1e-4, atol=2e-3 if loose else 2e-6
    )
    assert compiled.ledger == eager.ledger
    one, other = sf.open_run(tmp_path / "eager").log(), view.log()
    for column in (
        "step",
        "epoch",
        "samples",
        "batch_samples",
        "micro_batches",
        "permitted",
        "verdict",
        "lr",
    ):
        assert one[column].tolist() == other[column].tolist(), column
    for column in ("loss", "grad_norm", "guard_clip", "loss_scale"):
        np.testing.assert_allclose(other[column], one[column], rtol=5e-2 if loose else 1e-3)
    measured = np.isfinite(one["update_ratio"])
    np.testing.assert_allclose(
        other["update_ratio"][measured], one["update_ratio"][measured], rtol=0.2 if loose else 1e-2
    )


# ---------------------------------------------------------------------------------- exactly alike


@pytest.mark.parametrize(
    "name",
    [
        "batch norm and dropout",
        "accumulation with dropout",
        pytest.param("optimizer adamw", marks=pytest.mark.soak),
    ],
)
def test_an_interrupted_run_is_alike_to_the_bit(name, tmp_path):
    changed = recipe(**CASES[name])
    whole, _ = run(changed, tmp_path / "whole", COMPILED)
    for stop in (0, 1, 12, 20):
        for outcome in sf.steps(changed, out=tmp_path / "parts", operations=COMPILED):
            if outcome.step >= stop:
                break
    parts, _ = run(changed, tmp_path / "parts", COMPILED)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert sf.replay_step(changed, tmp_path / "parts", step=25).differences == []


def diverging(**changes):
    """The rate jumps; and one sample is not a number."""
    x, y = blobs(6000, classes=3)
    x[77, 0] = math.nan
    schedule = sf.constant(over=500) >> sf.constant(over=3) * 3000.0 >> sf.cosine(to=0.1)
    return recipe(
        data=sf.Arrays(x, y), batch=sf.Batch(16), schedule=schedule, until=700, gradient=(), **changes
    )


def test_the_guard_decides_alike_and_a_healed_run_is_alike_to_the_bit(tmp_path):
    eager, _ = run(diverging(), tmp_path / "eager", EAGER)
    whole, _ = run(diverging(), tmp_path / "whole", COMPILED)
    for stop in (450, 502, 505, 600):
        for outcome in sf.steps(diverging(), out=tmp_path / "parts", operations=COMPILED):
            if outcome.step >= stop:
                break
    parts, _ = run(diverging(), tmp_path / "parts", COMPILED)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    told = [
        [
            (e["kind"], e.get("step"), e.get("ids"), e.get("remedy"))
            for e in sf.open_run(tmp_path / name).events()
            if e["kind"] in ("quarantined", "rolled_back")
        ]
        for name in ("eager", "whole", "parts")
    ]
    assert told[0] == told[1] == told[2]
    assert {kind for kind, *_ in told[0]} == {"quarantined", "rolled_back"}
    assert whole.ledger == eager.ledger


def test_nearly_all_steps_are_compiled_and_most_of_them_settled_together(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "AHEAD_S", 60.0)  # however slow the machine is
    built = build(recipe(until=1000), RunFolder(tmp_path / "run"), Operations(compute={"compile": "on"}))
    eager, together = [], []
    step_by_step, settle = course.train_step, calm.settle_calm
    monkeypatch.setattr(
        course, "train_step", lambda *of, **how: eager.append(of[1].slots.step) or step_by_step(*of, **how)
    )
    monkeypatch.setattr(
        calm,
        "settle_calm",
        lambda run, taken, **times: together.append(len(taken)) or settle(run, taken, **times),
    )
    ordinary = [outcome.step for outcome in run_steps(built)]
    assert eager == [0]
    assert len(ordinary) + sum(together) == 1000
    assert {799, 999} <= set(ordinary)
    assert sum(together) > 800  # all but those of the guard's burn-in


def calmly(changed, out, monkeypatch, *, calm, compile="on", **operations):
    """A run, with or without steps that are settled together; what it tells besides times."""
    with monkeypatch.context() as patch:
        if not calm:
            patch.setattr(train.Run, "undisturbed", lambda self, until: 0)
        operations = Operations(compute={"compile": compile}, progress="off", **operations)
        done, built = run(changed, out, operations)
    view, log = sf.open_run(out), sf.open_run(out).log()
    timed = ("data_wait_s", "step_s", "wall_s", "cost", "time_s")
    columns = {name: column.tolist() for name, column in log.items() if name not in timed}
    events = [
        {
            k: v
            for k, v in e.items()
            if k not in ("n", "run", "time", "seconds", "stall_s", "name", "post_mortem")
        }
        for e in view.events()
        if e["kind"] not in ("checkpointed", "certified")
    ]
    assert view.verify() == []
    return (
        (done.status, done.digest, done.ledger, done.metrics),
        columns,
        events,
        built.state.guard.state_dict(),
    )


EVENTFUL = {
    "dropout": {"model": Normed, "until": 700},
    "ragged": {"data": sf.Arrays(*blobs(195, classes=3)), "until": 700},
    "validated": {
        "until": 700,
        "validation": sf.Validation(sf.Arrays(*blobs(50, classes=3)), every=37),
    },
    "stopped early": {
        "until": 700,
        "validation": sf.Validation(sf.Arrays(*blobs(50, classes=3)), every=37),
        "early_stopping": sf.EarlyStopping("loss", patience=2),
    },
    "guard off": {"guard": sf.Guard("off"), "until": 700},
    "several passes": {"batch": sf.Batch(20, micro=7), "until": 500},
    "fp16": {"precision": "fp16", "until": 500},
    "watched": {"guard": sf.Guard("watch"), "optimizer": sf.SGD(lr=1e-9), "until": 500},
    "slow": {"optimizer": sf.SGD(lr=1e-9), "until": 500},
    "healed": None,
    "vanishing": {
        "model": lambda: nn.Sequential(
            nn.Linear(8, 16), *(m for _ in range(10) for m in (nn.Sigmoid(), nn.Linear(16, 16)))
        ),
        "optimizer": sf.SGD(lr=1e-4),
        "until": 650,
    },
}


@pytest.mark.parametrize("name", EVENTFUL)
def test_calm_steps_are_those_that_would_be_taken_one_by_one(name, tmp_path, monkeypatch):
    changed = diverging() if name == "healed" else recipe(**EVENTFUL[name])
    found = [
        calmly(changed, tmp_path / str(calm), monkeypatch, calm=calm, checkpoint={"every": 61})
        for calm in (True, False)
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_equal(a, b)  # NaN is NaN
    assert ("layer" in {e["kind"] for e in found[0][2]}) == (name == "vanishing")


@pytest.mark.parametrize("at", [500, 1300])
def test_healing_is_the_same_however_seldom_states_are_kept(tmp_path, monkeypatch, at):
    schedule = sf.constant(over=at) >> sf.constant(over=3) * 1e5 >> sf.cosine(to=0.1)
    (x, y), rng = blobs(600, classes=3), np.random.default_rng(0)
    noisy = sf.Arrays(x, np.where(rng.random(600) < 0.3, rng.integers(0, 3, 600), y))

    def changed():
        return recipe(data=noisy, schedule=schedule, until=at + 200, gradient=())

    seldom, often = tmp_path / "seldom", tmp_path / "often"
    found = [calmly(changed(), seldom, monkeypatch, calm=True, checkpoint={"every": 5000})]
    monkeypatch.setattr(train, "SELDOM", EVERY)
    found.append(calmly(changed(), often, monkeypatch, calm=True, checkpoint={"every": 5000}))
    np.testing.assert_equal(*found)
    (back,) = (e for e in sf.open_run(seldom).events() if e["kind"] == "rolled_back")
    assert back["step"] % SELDOM != 0  # so that one is made again from another
    assert math.isfinite(found[0][1]["loss"][-1])


def test_what_takes_a_while_is_told_before_it_does(tmp_path, monkeypatch):
    """A compiler may take half a minute."""
    told = list[str]()

    def say(text):
        assert not (tmp_path / "run").exists()
        told.append(text)

    build(recipe(), RunFolder(tmp_path / "run"), COMPILED, say=say)
    assert told == ["compiling the whole step, before the first; --compile off does without"]
    build(recipe(), RunFolder(tmp_path / "eager"), Operations(), say=told.append)
    assert len(told) == 1


def test_a_callers_profiler_sees_each_step(tmp_path):
    with torch.profiler.profile() as seen:
        run(recipe(until=150), tmp_path / "run", Operations(compute={"compile": "on"}, progress="off"))
    (found,) = (e for e in seen.key_averages() if e.key == "compiled step")
    assert found.count == 150


class Tabled(nn.Sequential):
    """Has a constant."""

    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.register_buffer("table", torch.ones(16))


@pytest.mark.parametrize("compile", ["off", "on"])
def test_constant_buffers_are_constant_after_going_back(tmp_path, compile):
    operations = Operations(compute={"compile": compile}, progress="off")
    _, built = run(diverging(model=Tabled), tmp_path / "run", operations)
    assert any(e["kind"] == "rolled_back" for e in sf.open_run(tmp_path / "run").events())
    assert set(built.run.parts.buffers.changing) == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip


def test_the_budget_counts_the_time_of_going_back_in_this_attempt_and_the_next(tmp_path, monkeypatch):
    reached, told = Budget.reached, []

    def telling(self, step, *, wall_s, cost):
        told.append(self.spent_s + wall_s)
        return reached(self, step, wall_s=wall_s, cost=cost)

    monkeypatch.setattr(Budget, "reached", telling)
    run(diverging(), tmp_path / "run", Operations(compute={"compile": "off"}, budget={"updates": 650}))
    view = sf.open_run(tmp_path / "run")
    (back,), log = (e for e in view.events() if e["kind"] == "rolled_back"), view.log()
    assert told == sorted(told)
    assert log["wall_s"][back["step"]] > back["seconds"]
    told.clear()
    run(diverging(), tmp_path / "run", EAGER)
    assert told[0] > log["wall_s"].sum()


def test_a_run_that_is_interrupted_between_calm_steps_ends_with_the_same_bits(tmp_path):
    changed = recipe(model=Normed, data=sf.Arrays(*blobs(195, classes=3)), until=900)
    for at in (3, 64, 70, 97, 150, 199, 200, 263, 264, 398, 512, 640, 799, 800, 801, 899, 900):
        limited = Operations(compute={"compile": "on"}, progress="off", budget={"updates": at})
        parts, _ = run(changed, tmp_path / "parts", limited)
    whole, _ = run(changed, tmp_path / "whole", Operations(compute={"compile": "on"}))
    assert (parts.status, parts.digest, parts.ledger) == ("finished", whole.digest, whole.ledger)


@pytest.mark.parametrize("at", [798, 799, 800, 801])
def test_a_run_that_is_continued_where_all_is_checked_goes_on_with_what_was_kept(tmp_path, at):
    """The first step after it goes through torch, and the next is a calm one."""
    limited = Operations(compute={"compile": "on"}, progress="off", budget={"updates": at})
    run(recipe(until=1000), tmp_path / "parts", limited)
    whole, parts = (
        run(recipe(until=1000), tmp_path / name, Operations(compute={"compile": "on"}))[0]
        for name in ("whole", "parts")
    )
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)


def test_a_stop_is_heeded_after_calm_steps_without_waiting_for_a_batch(tmp_path, monkeypatch):
    settle, last = calm.settle_calm, []

    def asked(run, taken, **times):
        run.stop.reason = "SIGTERM"
        last.append(taken[-1].slots.step)
        return settle(run, taken, **times)

    monkeypatch.setattr(calm, "settle_calm", asked)
    done, _ = run(recipe(until=700), tmp_path / "run", Operations(compute={"compile": "on"}))
    assert (done.status, done.reason) == ("preempted", "SIGTERM")
    assert last[-1] == done.step - 1
    assert last[-1] - last[0] <= 2 * calm.LAP  # what was under way


def test_a_budget_is_met_exactly_by_calm_steps(tmp_path):
    limited = Operations(compute={"compile": "on"}, progress="off", budget={"updates": 333})
    done, _ = run(recipe(until=700), tmp_path / "run", limited)
    assert (done.status, done.step) == ("budget", 333)


class Masked:
    def method(self, x):
        return [F.dropout(x, 0.5)]


def test_what_compiling_draws_changes_no_mask(monkeypatch):
    def draws(*of, **options):
        torch.rand(7)
        return compile_fx(*of, **options)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", draws)
    compiled, x, seen = Compiled(Masked().method), torch.ones(64), []
    for _ in range(2):
        torch.manual_seed(3)
        seen.append(compiled((x,))[0])
    torch.manual_seed(3)
    assert torch.equal(seen[0], F.dropout(x, 0.5))
    assert torch.equal(seen[1], seen[0])


# ---------------------------------------------------------------------------------- the choice


def choice(changed, out, operations=EAGER):
    built = build(changed, RunFolder(out), operations)
    result(built)
    return sf.open_run(out).identity["environment"]["compiled"], built.notes


AUTO = Operations(progress="off")


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "step"),
        ({"until": 29}, ""),
        (
            {"model": lambda: nn.Sequential(nn.Linear(8, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 3))},
            "",
        ),
        ({"model": Branching}, ""),
        ({"optimizer": lambda groups: torch.optim.ASGD(groups, lr=0.1)}, ""),
    ],
)
def test_auto_is_a_rule(changes, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr("surefoot.choice.ENOUGH_UPDATES", 30)
    done, built = run(recipe(**changes), tmp_path / "run", AUTO)
    assert sf.open_run(done.run_dir).identity["environment"]["compiled"] == chosen
    (note,) = [note for note in built.notes if "compiled" in note]
    assert note.startswith("compiled: the whole step" if chosen else "not compiled: ")


def test_the_choice_is_kept(tmp_path, monkeypatch):
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=COMPILED):
        if outcome.step == 10:
            break
    done, built = run(recipe(), tmp_path / "run", AUTO)
    assert built.run.graph is not None
    whole, _ = run(recipe(), tmp_path / "whole", COMPILED)
    assert done.digest == whole.digest


def test_a_compiled_run_that_cannot_be_compiled_is_not_continued_otherwise(tmp_path, monkeypatch):
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=COMPILED):
        if outcome.step == 10:
            break
    monkeypatch.setattr("surefoot.choice.refusal", lambda parts: "there is no compiler")
    with pytest.raises(sf.OperationsError, match="cannot be here: there is no compiler") as refused:
        sf.fit(recipe(), out=tmp_path / "run", operations=AUTO)
    assert "Compiled and not, they agree to rounding only." in str(refused.value)
    done = sf.fit(recipe(), out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    resumed = [e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "resumed"][-1]
    assert resumed["environment_changed"]["compiled"] == ["step", ""]


def test_what_cannot_be_one_graph_is_compiled_as_far_as_it_goes(tmp_path):
    done, built = run(recipe(model=Broken), tmp_path / "run", COMPILED)
    assert done.status == "finished"
    assert sf.open_run(tmp_path / "run").identity["environment"]["compiled"] == "forward"
    assert any("forward pass and losses; not the whole step" in note for note in built.notes)


def test_what_would_be_compiled_for_each_number_is_eager(tmp_path):
    done, built = run(recipe(model=Branching), tmp_path / "run", COMPILED)
    assert done.status == "finished"
    assert sf.open_run(tmp_path / "run").identity["environment"]["compiled"] == ""
    assert "the forward pass would be compiled anew in each step" in built.notes[0]


def test_trying_leaves_the_state_as_it_was(tmp_path):
    one = build(recipe(model=Normed), RunFolder(tmp_path / "a"), COMPILED)
    other = build(recipe(model=Normed), RunFolder(tmp_path / "b"), EAGER)
    a, b = one.state.snapshot(), other.state.snapshot()
    assert a.facts == b.facts
    assert all(torch.equal(a.model[name], b.model[name]) for name in b.model)
    for built in (one, other):
        result(built)


def test_without_a_compiler(tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    environment = {"PATH": str(bare), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = ("train", ROOT / "examples/digits.py", "epochs=1", "hidden=8", "dropout=0.0")
    done = surefoot(*command, "--out", tmp_path / "run", "--compile", "on", env=environment)
    assert done.returncode == 2, done.stderr
    assert "nothing can be compiled here" in done.stderr
    assert "g++" in done.stderr
    assert not (tmp_path / "run").exists()
    done = surefoot(*command, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------- what must not be missed


class Sized(nn.Module):
    """Notes the size of its batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.n = nn.Linear(8, 3), 0

    def forward(self, x):
        self.n = len(x)
        return self.layer(x) * (self.n / 20)


class Assigned(nn.Module):
    """Puts another tensor in a buffer's place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        out = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x) + torch.from_numpy(0.01 * np.random.randn(3).astype("float32"))


def hooked():
    model = mlp()
    mask = torch.ones(16, 8)
    mask[3] = 0
    model[0].weight.register_hook(lambda grad: grad * mask)
    return model


@pytest.mark.parametrize("model", [Sized, Assigned, Noisy, hooked])
def test_a_model_that_a_graph_would_get_wrong_is_refused(model, tmp_path):
    changed = recipe(model=model, data=sf.Arrays(*blobs(195, classes=3)))
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    other, _ = run(changed, tmp_path / "other", COMPILED)
    compiled = sf.open_run(tmp_path / "other").identity["environment"]["compiled"]
    assert compiled == ("" if model is Noisy else "forward")
    torch.testing.assert_close(flat(other.model), flat(eager.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [list, dict, set])
def test_a_collection_that_grows_is_a_change(kept):
    model = mlp()
    model[0].kept = kept()
    unchanged = Unchanged(model, [])
    assert unchanged()
    getattr(model[0].kept, {list: "append", set: "add", dict: "setdefault"}[kept])(1)
    assert not unchanged()


def closing(over):
    held = SimpleNamespace(beta=0.5, table=[1.0, 2.0], inner=SimpleNamespace(gamma=1))

    def objective(model, data):
        return held.beta * over[0] * F.cross_entropy(model(data[0]), data[1], reduction="none") * GAMMA[0]

    return objective, held


GAMMA = [1.0]


@pytest.mark.parametrize("what", ["attribute", "item", "deeper", "cell", "global"])
def test_what_a_function_reads_counts_however_it_is_held(what):
    over = [1.0]
    objective, held = closing(over)
    unchanged = Unchanged(mlp(), [objective])
    assert unchanged()
    try:
        if what == "attribute":
            held.beta = 0.25
        elif what == "item":
            held.table[1] = 3.0
        elif what == "deeper":
            held.inner.gamma = 2
        elif what == "cell":
            over[0] = 2.0
        else:
            GAMMA[0] = 2.0
        assert not unchanged()
    finally:
        GAMMA[0] = 1.0


class Strided:
    """Square images, in some batches lying the other way round in memory."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = torch.tensor(rng.normal(size=(200, 8, 8)).astype("float32"))
        self.y = torch.tensor(rng.integers(0, 3, 200))

    def __len__(self):
        return 200

    def fetch(self, ids):
        x = self.x[ids]
        if ids[0] % 2:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x, self.y[ids]


def flattening():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Twice:
    """One tensor under two names, in some batches."""

    def __init__(self):
        self.x, y = map(torch.as_tensor, blobs(200, classes=3))
        self.y = y

    def __len__(self):
        return 200

    def fetch(self, ids):
        a = self.x[ids]
        return {"a": a, "b": a if ids[0] % 2 else a.flip(1), "y": self.y[ids]}


def both(model, data):
    return F.cross_entropy(model(data["a"]) - 2 * model(data["b"]), data["y"], reduction="none")


@pytest.mark.parametrize("case", ["strides", "aliases"])
def test_batches_that_lie_otherwise_in_memory(case, tmp_path):
    if case == "strides":
        changed = recipe(data=Strided(), model=flattening)
    else:
        changed = recipe(data=Twice(), objective=both)
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    other, _ = run(changed, tmp_path / "other", COMPILED)
    torch.testing.assert_close(flat(other.model), flat(eager.model), rtol=1e-4, atol=1e-5)


def annealed(out, operations, *, begin=0, stop=60):
    """A coefficient that the body changes, as the weight of a divergence is."""
    settings = SimpleNamespace(beta=0.0)

    def objective(model, data):
        logits = model(data[0])
        return F.cross_entropy(logits, data[1], reduction="none") + settings.beta * logits.square().sum(1)

    changed = recipe(objective=objective, until=60)
    built = build(changed, RunFolder(out), operations)
    built.run.alone = False  # as `sf.steps` does
    settings.beta = begin / 600
    for outcome in run_steps(built):
        settings.beta = (outcome.step + 1) / 600
        if outcome.step + 1 == stop:
            break
    return sf.open_run(out)


def test_what_the_callers_body_changes_counts_at_once(tmp_path):
    eager, compiled = annealed(tmp_path / "eager", EAGER), annealed(tmp_path / "compiled", COMPILED)
    np.testing.assert_allclose(compiled.log()["loss"], eager.log()["loss"], rtol=1e-4)
    (told,) = [e for e in compiled.events() if e["kind"] == "uncompiled"]
    assert told["step"] in (1, 2)


def test_a_run_that_went_on_eagerly_does_so_when_it_is_continued(tmp_path):
    whole = annealed(tmp_path / "whole", COMPILED)
    annealed(tmp_path / "parts", COMPILED, stop=30)
    parts = annealed(tmp_path / "parts", COMPILED, begin=30)
    assert [e["kind"] for e in parts.events()].count("uncompiled") == 1
    assert parts.log()["loss"].tolist() == whole.log()["loss"].tolist()
    assert parts.summary()["digest"] == whole.summary()["digest"]


def test_no_old_gradients_are_left(tmp_path):
    seen = []
    for outcome in sf.steps(recipe(), out=tmp_path / "run", operations=COMPILED):
        seen.append({p.grad is None for p in outcome.model.parameters()})
    assert seen[0] == {False}
    assert all(grads == {True} for grads in seen[1:])


# ---------------------------------------------------------------------------------- changes by metrics


class Settings(nn.Module):
    """Scaled by a number that it keeps where no attribute tells."""

    def __init__(self):
        super().__init__()
        self.inner, self.settings, self.last = mlp(), {"scale": 1.0}, 0.0

    def forward(self, x):
        return self.inner(x) * self.settings["scale"]


def scaling(model, data):
    model.settings["scale"] = 2.0 + 4 * float(next(model.parameters())[0, 0])
    return CE(model, data)


def noting(model, data):
    losses = CE(model, data)
    model.last = losses.mean().item()
    return losses


def moving(model, data):
    for p in model.parameters():
        p.data = p.data.clone()
    return CE(model, data)


@pytest.mark.parametrize("metric", [noting, moving])
def test_what_a_metric_changes_ends_the_compiled_steps_for_good(metric, tmp_path):
    validation = sf.Validation(sf.Arrays(*blobs(60, classes=3)), metrics={"m": metric}, every=10)
    changed = recipe(model=Settings, validation=validation)
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    whole, _ = run(changed, tmp_path / "whole", COMPILED)
    for outcome in sf.steps(changed, out=tmp_path / "parts", operations=COMPILED):
        if outcome.step == 17:
            break
    parts, _ = run(changed, tmp_path / "parts", COMPILED)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    torch.testing.assert_close(flat(whole.model), flat(eager.model), rtol=1e-4, atol=1e-5)
    assert "uncompiled" in {e["kind"] for e in sf.open_run(tmp_path / "whole").events()}


def test_what_a_metric_changes_out_of_sight_counts_at_once(tmp_path):
    validation = sf.Validation(sf.Arrays(*blobs(60, classes=3)), metrics={"m": scaling}, every=10)
    changed = recipe(model=Settings, validation=validation)
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    compiled, _ = run(changed, tmp_path / "compiled", COMPILED)
    torch.testing.assert_close(flat(compiled.model), flat(eager.model), rtol=1e-4, atol=1e-5)


class Sometimes:
    """Tells the weights beforehand for some batches only."""

    def __init__(self, first):
        self.first = first

    def __call__(self, model, data):
        return F.cross_entropy(model(data[0]), data[1], reduction="none")

    def weigh(self, data):
        return torch.full((len(data[1]),), 4.0) if (data[0][0, 0] > 0) == self.first else None


class Changing:
    """One tensor of the batch is another one, now this, now that."""

    def __len__(self):
        return 200

    def fetch(self, ids):
        x, y = (torch.from_numpy(a[ids]) for a in blobs(200, classes=3))
        other = x * 0.5 + 1
        return {"p": x, "q": x if ids[0] % 2 else other, "r": other, "y": y}


def three(model, data):
    logits = model(data["p"] + 2 * data["q"] - data["r"])
    return F.cross_entropy(logits, data["y"], reduction="none")


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Sometimes(True)},
        {"objective": Sometimes(False)},
        {"data": Changing(), "objective": three},
    ],
    ids=["weighs", "weighs not", "aliases"],
)
def test_steps_that_are_not_like_the_traced_one_are_eager(changes, tmp_path):
    changed = recipe(**changes)
    eager, _ = run(changed, tmp_path / "eager", EAGER)
    compiled, _ = run(changed, tmp_path / "compiled", COMPILED)
    torch.testing.assert_close(flat(compiled.model), flat(eager.model), rtol=1e-4, atol=1e-5)


class Checkpointed(Attending):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_that_is_computed_again_in_the_backward_pass(precision, tmp_path):
    done, _ = run(recipe(model=Checkpointed, precision=precision), tmp_path / "run", EAGER)
    assert done.status == "finished"


@pytest.mark.parametrize("compile", ["auto", "on"])
def test_what_is_computed_again_in_the_backward_pass_is_not_compiled_as_a_whole(compile, tmp_path):
    """A trace that failed left torch unable to do that at all, in this run and all later ones."""

    def steps(name, mode):
        operations = Operations(compute={"compile": mode}, budget={"updates": 10}, progress="off")
        run(recipe(model=Checkpointed, until=60_000), tmp_path / name, operations)
        return sf.open_run(tmp_path / name).log()["loss"]

    tried, after = steps("tried", compile), steps("after", "off")
    np.testing.assert_allclose(tried, after, rtol=1e-4)
    started, *_ = (e for e in sf.open_run(tmp_path / "tried").events() if e["kind"] == "started")
    assert started["environment"]["compiled"] == ("forward" if compile == "on" else "")


def scripted():
    return torch.jit.script(mlp())


def penalised(model, data):
    x = data[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return CE(model, data) + slope.square().sum(1)


def curved(model, data):
    slopes = torch.func.vmap(torch.func.jacrev(lambda x: model(x).logsumexp(-1)))(data[0])
    return CE(model, data) + slopes.square().sum(1)


class Conditional(nn.Module):
    """Takes one of two ways, by an operation that torch traces by itself."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.ways[0], self.ways[1], (x,))


@pytest.mark.parametrize(
    ("changes", "extent"),
    [
        ({"model": scripted}, ""),
        ({"objective": penalised}, ""),
        ({"objective": curved}, "step"),
    ],
    ids=["TorchScript", "gradient penalty", "jacrev"],
)
def test_a_long_run_trains_whatever_the_rule_thinks_of_its_model(changes, extent, tmp_path):
    def log(mode):
        operations = Operations(compute={"compile": mode}, budget={"updates": 6}, progress="off")
        run(recipe(until=60_000, **changes), tmp_path / mode, operations)
        return sf.open_run(tmp_path / mode).log()["loss"]

    np.testing.assert_allclose(log("auto"), log("off"), rtol=1e-4)
    started, *_ = (e for e in sf.open_run(tmp_path / "auto").events() if e["kind"] == "started")
    assert started["environment"]["compiled"] == extent


def by_itself(tmp_path, changes, *options):
    """A run in a process of its own: torch remembers what it failed to compile, and what it compiled."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_graph\n"
        "def recipe():\n"
        f"    return test_graph.recipe({changes})\n"
    )
    return surefoot("train", file, "--out", tmp_path / "run", *options)


def test_a_model_that_torch_traces_by_itself_trains_by_the_rule(tmp_path):
    told = by_itself(tmp_path, "model=test_graph.Conditional, until=60_000", "--set", "budget.updates=6")
    assert told.returncode == 4, told.stderr
    assert "cannot be counted: NotImplementedError: what torch does in cond" in told.stderr
    assert np.isfinite(sf.open_run(tmp_path / "run").log()["loss"]).all()


def test_what_cannot_go_back_compiled_is_told_before_the_run_begins(tmp_path):
    told = by_itself(tmp_path, "objective=test_graph.penalised", "--compile", "on")
    assert told.returncode == 2
    assert "nothing can be compiled here" in told.stderr
    assert "double backward" in told.stderr
    assert not (tmp_path / "run/steps").exists()


def test_a_state_that_does_not_fit_is_not_kept_for_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(heal, "_free_bytes", lambda device: 0)
    _, built = run(diverging(), tmp_path / "run", Operations(compute={"compile": "on"}, progress="off"))
    assert any(e["kind"] == "rolled_back" for e in sf.open_run(tmp_path / "run").events())
    assert not built.run.healer.memory


def test_layers_that_were_told_of_are_not_told_of_again_after_going_back(tmp_path, monkeypatch):
    schedule = sf.constant(over=750) >> sf.constant(over=3) * 1e9 >> sf.constant()
    told = []
    for seldom in (SELDOM, EVERY):
        monkeypatch.setattr(train, "SELDOM", seldom)
        changed = recipe(**EVENTFUL["vanishing"] | {"until": 1300, "schedule": schedule, "gradient": ()})
        out = tmp_path / str(seldom)
        _, _, events, guard = calmly(changed, out, monkeypatch, calm=True, checkpoint={"every": 5000})
        told.append(([(e["kind"], e.get("step"), e.get("layer")) for e in events], guard["layers"]))
    np.testing.assert_equal(*told)
    kinds = [kind for kind, *_ in told[0][0]]
    assert {"rolled_back", "layer"} <= set(kinds)
    layers = [layer for kind, _, layer in told[0][0] if kind == "layer"]
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("mode", ["heal", "watch"])
def test_layers_are_looked_at_after_the_alarm_of_the_same_step(mode, tmp_path, monkeypatch):
    """Eight samples that are left out early put the review's blocks off, so that D6 falls on step 200."""
    monkeypatch.setattr(clock, "AHEAD_S", 5.0)
    x, y = blobs(6000, classes=3)

    def changed():
        settings = EVENTFUL["vanishing"] | {"optimizer": sf.SGD(lr=1e-9), "until": 650}
        return recipe(data=sf.Arrays(x, y), guard=sf.Guard(mode), **settings)

    run(changed(), tmp_path / "before", Operations(compute={"compile": "off"}, budget={"updates": 1}))
    for step in range(10, 26, 2):
        x[sf.open_run(tmp_path / "before").plan.ids(step)[3], 0] = math.nan
    found = [
        calmly(changed(), tmp_path / str(calm), monkeypatch, calm=calm, checkpoint={"every": 5000})
        for calm in (True, False)
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_equal(a, b)


class Unused(nn.Sequential):
    """Has a weight that nothing depends on."""

    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.ones(3))


def test_weights_are_looked_at_however_seldom_states_are_kept(tmp_path, monkeypatch):
    def told(name):
        calls = []

        def metric(model, data):
            calls.append(1)
            if len(calls) == 28:  # the first is a trial: after step 999, so that no streak begins
                with torch.no_grad():
                    model.unused.fill_(math.nan)
            return torch.zeros(len(data[0]))

        validation = sf.Validation(sf.Arrays(*blobs(20)), {"m": metric}, every=37)
        changed = recipe(model=Unused, until=1100, validation=validation)
        found = calmly(changed, tmp_path / name, monkeypatch, calm=True, checkpoint={"every": 5000})
        return [(e["kind"], e.get("step"), e.get("detector")) for e in found[2] if e["kind"] != "validated"]

    seldom = told("seldom")
    monkeypatch.setattr(train, "SELDOM", EVERY)
    assert seldom == told("often")
    assert "D0" in {detector for *_, detector in seldom}, seldom
