"""What only a GPU can show. Marked `gpu`: run where torch sees one."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, recipe, surefoot
from test_many_compiled import Lengths, Pooled
from torch import nn
from torch.utils.checkpoint import checkpoint

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.captured import Captured
from surefoot.prepare import prepare
from surefoot.record.folder import RunFolder
from surefoot.train_step import train_step
from surefoot.tune.compute import tune_compute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]


def make():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


SPECS = [sf.SGD(lr=0.1, momentum=0.9), sf.AdamW(lr=0.01)]
CAPTURED = sf.Operations(compute={"compile": "on"})
EAGER = sf.Operations(compute={"compile": "off"})


def rows(run):
    """Of the log, without what the clock has a part in."""
    log = sf.open_run(run.run_dir).log()
    return {name: str(column.tolist()) for name, column in log.items() if name not in TIMES}


TIMES = {"attempt", "data_wait_s", "step_s", "wall_s", "time_s", "cost"}


def compiled(run):
    return sf.open_run(run.run_dir).identity["environment"]["compiled"]


def events(run, kind):
    return [event for event in sf.open_run(run.run_dir).events() if event["kind"] == kind]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_continues_to_the_bit(tmp_path, spec, precision):
    changed = recipe(
        model=make, optimizer=spec, precision=precision, batch=sf.Batch(30, micro=8), until="20ep"
    )
    whole = sf.fit(changed, out=tmp_path / "whole", operations=CAPTURED)
    for stop in (5, 17, 18, 90, 91, 140):
        for outcome in sf.steps(changed, out=tmp_path / "parts", operations=CAPTURED):
            if outcome.step == stop:
                break
    parts = sf.fit(changed, out=tmp_path / "parts", operations=CAPTURED)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert rows(parts) == rows(whole)
    assert "cuda" in sf.open_run(parts.run_dir).identity["environment"]["device"]
    assert compiled(whole) == compiled(parts) == "captured"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("micro", [None, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("guard", ["heal", "watch", "off"])
def test_captured_steps_have_the_bits_of_eager_ones(tmp_path, spec, micro, precision, guard):
    changed = recipe(
        model=make,
        optimizer=spec,
        precision=precision,
        batch=sf.Batch(30, micro=micro),
        schedule=sf.cosine(),
        gradient=(sf.clip_norm(0.5),),
        guard=sf.Guard(guard),
        until="25ep",
    )
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    eager = sf.fit(changed, out=tmp_path / "eager", operations=EAGER)
    assert (compiled(captured), compiled(eager)) == ("captured", "")
    assert rows(captured) == rows(eager)
    assert (captured.digest, captured.ledger) == (eager.digest, eager.ledger)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)
    )


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    return Last()


@pytest.mark.parametrize(
    ("model", "shape"), [(convolutional, (1, 8, 8)), (recurrent, (5, 8))], ids=["conv", "gru"]
)
def test_captured_models_have_the_bits_of_eager_ones(tmp_path, model, shape):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, *shape)).astype("float32"), rng.integers(0, 3, 300)
    changed = recipe(model=model, data=sf.Arrays(x, y), until="20ep", batch=sf.Batch(32))
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    eager = sf.fit(changed, out=tmp_path / "eager", operations=EAGER)
    assert compiled(captured) == "captured"
    assert captured.digest == eager.digest


@pytest.mark.parametrize("operations", [CAPTURED, EAGER], ids=["captured", "eager"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_a_step_never_waits_for_the_device(tmp_path, spec, operations):
    changed = recipe(model=make, optimizer=spec, gradient=(sf.clip_norm(1.0),), until="25ep")
    operations = sf.Operations(checkpoint={"every": "1h"}, compute={"compile": operations.compute.compile})
    try:
        for outcome in sf.steps(changed, out=tmp_path / "run", operations=operations):
            if outcome.step in (10, 120):
                torch.cuda.set_sync_debug_mode("error")
            if outcome.step in (80, 180):  # captured from 64 on
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operations", [CAPTURED, EAGER], ids=["captured", "eager"])
def test_broken_samples_are_found_and_left_out(tmp_path, operations):
    x, y = blobs(1024)
    x[[77, 500]] = np.nan
    done = sf.fit(
        recipe(model=make, data=sf.Arrays(x, y), until="15ep"), out=tmp_path, operations=operations
    )
    assert done.status == "finished"
    named = {i for event in events(done, "quarantined") for i in event["ids"]}
    assert named == {77, 500}
    assert compiled(done) == ("captured" if operations is not EAGER else "")


def test_a_run_that_diverges_goes_back_and_on(tmp_path):
    """Captured steps read the weights and the optimizer's state that were put back."""

    def train(name, operations):
        changed = recipe(model=make, until="80ep")
        taken = enumerate(sf.steps(changed, out=tmp_path / name, operations=operations))
        for num, outcome in taken:
            if num == 450:
                with torch.no_grad():
                    outcome.model[4].weight.fill_(50.0)
        return sf.fit(changed, out=tmp_path / name, operations=operations)

    captured, eager = train("captured", CAPTURED), train("eager", EAGER)
    assert events(captured, "rolled_back")
    assert rows(captured) == rows(eager)
    assert captured.digest == eager.digest


def test_a_validation_between_captured_steps(tmp_path):
    changed = recipe(
        model=make, validation=sf.Validation(sf.Arrays(*blobs(128, seed=1)), every="1ep"), until="20ep"
    )
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    eager = sf.fit(changed, out=tmp_path / "eager", operations=EAGER)
    assert (captured.digest, captured.metrics) == (eager.digest, eager.metrics)


class Waits(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x) * (1.0 if x.sum().item() else 2.0)


class DrawsOnTheHost(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x + 0.01 * torch.randn(8).pin_memory().to(x.device, non_blocking=True))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.num = make(), 0

    def forward(self, x):
        self.num += 1
        return self.net(x)


@pytest.mark.parametrize(
    ("changes", "extent", "says"),
    [
        ({"model": Waits}, None, "waits for the GPU"),  # how far torch gets depends on what it has compiled
        ({"model": Counts}, "", "changes its attributes in a step"),
        ({"model": make, "optimizer": sf.RMSprop(lr=0.01)}, "forward", "cannot take the guard's go-ahead"),
    ],
    ids=["waits", "counts", "optimizer"],
)
def test_what_cannot_be_captured_has_its_forward_pass_compiled_if_possible(tmp_path, changes, extent, says):
    changed = recipe(until="12ep", **changes)
    run = sf.fit(changed, out=tmp_path / "run", operations=CAPTURED)
    assert run.status == "finished"
    assert extent is None or compiled(run) == extent
    (note,) = build(changed, RunFolder(tmp_path / "notes"), CAPTURED).notes
    assert "not captured: " in note
    assert says in note
    if extent == "":
        assert run.digest == sf.fit(changed, out=tmp_path / "eager", operations=EAGER).digest


def test_what_can_neither_be_captured_nor_compiled_is_refused(tmp_path):
    changed = recipe(model=DrawsOnTheHost, until="12ep")
    with pytest.raises(sf.OperationsError, match="or from those of the CPU"):
        sf.fit(changed, out=tmp_path / "run", operations=CAPTURED)


def test_a_model_that_changes_on_the_way_goes_on_eagerly(tmp_path):
    def train(name, operations):
        changed = recipe(model=make, until="20ep")
        for outcome in sf.steps(changed, out=tmp_path / name, operations=operations):
            if outcome.step == 100:
                outcome.model[3].p = 0.5
        return sf.fit(changed, out=tmp_path / name, operations=operations)

    captured = train("captured", CAPTURED)
    assert events(captured, "uncompiled")[0]["step"] == 101
    assert captured.digest == train("eager", EAGER).digest


RECIPE = """
import numpy as np
import surefoot as sf
import torch.nn.functional as F
from torch import nn

rng = np.random.default_rng(0)
x, y = rng.normal(size=(256, 8)).astype("float32"), rng.integers(0, 3, 256)


def recipe():
    return sf.Recipe(
        model=lambda: nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 3)),
        data=sf.Arrays(x, y),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.1),
        batch=sf.Batch(32),
        until="30ep",
    )
"""


def test_replay_from_the_command_line(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE)
    trained = surefoot("train", file, "--out", tmp_path / "run", "--compile", "on", fresh=True)
    assert trained.returncode == 0, trained.stderr
    assert "captured: the step is one CUDA graph" in trained.stdout + trained.stderr
    replayed = surefoot("replay", tmp_path / "run", "--step", "200", fresh=True)
    assert replayed.returncode == 0, replayed.stderr
    assert "reproduced" in replayed.stdout


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = make(), []

    def forward(self, x):
        self.seen.append(x.shape)
        return self.net(x)


def noted(groups):
    optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def followed():
    model = make()
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": Remembers}, "changes its attributes in a step"),
        ({"model": make, "optimizer": noted}, "hooked to the step of optimizer SGD"),
        ({"model": followed}, "hooked to the model"),
    ],
    ids=["remembers", "optimizer", "model"],
)
def test_python_that_a_launch_would_not_run_is_run(tmp_path, changes, says):
    built = build(recipe(until="12ep", **changes), RunFolder(tmp_path / "run"), CAPTURED)
    (note,) = built.notes
    assert says in note


def test_tuning_measures_captured_steps():
    tuned = tune_compute(recipe(model=make, until="20ep"), sf.Operations())
    assert [one.settings["compute.compile"] for one in tuned.tried] == ["off", "on"]
    assert not any(one.why_not for one in tuned.tried)


def test_steps_are_captured_by_a_rule(tmp_path, monkeypatch):
    def note(until):
        (found,) = build(
            recipe(model=make, until=until), RunFolder(tmp_path / str(until)), sf.Operations()
        ).notes
        return found

    assert note(999) == "not captured: under 1,000 updates it does not pay"
    assert note(1000).startswith("captured: the step is one CUDA graph")
    monkeypatch.setattr("surefoot.choice.MOST_MEMORY", 0.0)
    assert note(1001) == "not captured: a step takes more than 0% of the GPU's memory"


def test_steps_are_captured_if_asked_for_and_then_go_on_so(tmp_path):
    changed = recipe(model=make, until="12ep")
    for outcome in sf.steps(changed, out=tmp_path / "parts", operations=CAPTURED):
        if outcome.step == 70:
            break
    built = build(changed, RunFolder(tmp_path / "parts"), sf.Operations())
    assert any(note.startswith("captured: the step is one CUDA graph") for note in built.notes)


def test_a_run_begun_on_a_cpu_goes_on_on_a_gpu_and_back(tmp_path):
    changed = recipe(model=make, optimizer=sf.AdamW(lr=0.01), until="20ep")
    on = {device: sf.Operations(device=device) for device in ("cpu", "cuda")}
    for device, stop in (("cpu", 20), ("cuda", 90), ("cpu", 120)):
        for outcome in sf.steps(changed, out=tmp_path, operations=on[device]):
            if outcome.step == stop:
                break
    done = sf.fit(changed, out=tmp_path, operations=on["cuda"])
    assert done.status == "finished"
    assert done.step == 160


def test_a_body_finds_gradients_and_numbers_wherever_a_run_goes_on(tmp_path):
    """Which steps are captured differs between processes: the first of a form is not."""
    changed = recipe(model=make, batch=sf.Batch(30), until="20ep")

    def train(out, stops=(), operations=None):
        noted = {}
        for stop in (*stops, None):
            for outcome in sf.steps(changed, out=out, operations=operations or CAPTURED):
                grads = [p.grad.double().sum().item() for p in outcome.model.parameters()]
                noted[outcome.step] = (torch.rand(3, device="cuda").tolist(), random.random(), grads)
                if outcome.step == stop:
                    break
        return noted

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "parts", stops=(70, 97, 98, 106)) == whole
    assert train(tmp_path / "eager", operations=EAGER) == whole


@pytest.mark.parametrize("held", ["closure", "method"])
def test_what_a_body_anneals_counts_at_once(tmp_path, held):
    class Loss:
        beta = 1.0

        def __init__(self):
            self.beta = 1.0

        def of(self, model, data):
            return self.beta * F.cross_entropy(model(data[0]), data[1], reduction="none")

    def train(name, operations):
        loss, beta = Loss(), 1.0

        def closed(model, data):
            return beta * F.cross_entropy(model(data[0]), data[1], reduction="none")

        changed = recipe(objective=loss.of if held == "method" else closed, until="20ep")
        for outcome in sf.steps(changed, out=tmp_path / name, operations=operations):
            if outcome.step == 100:
                beta = loss.beta = 0.5
        return sf.open_run(tmp_path / name).log()["loss"].tolist()

    assert train("captured", CAPTURED) == train("eager", EAGER)


def test_a_capture_that_fails_leaves_all_in_order(tmp_path):
    made = prepare(recipe(model=Waits), EAGER)
    feed = made.feed(lambda kind, **facts: None)
    train_step(made.parts, feed.at(0), 0.0)
    stream, before = torch.cuda.current_stream(), torch.cuda.current_device()
    with pytest.raises(Exception, match=r"captur|synchroni"):
        Captured(made.parts).try_out(feed.at(1))
    assert (torch.cuda.current_stream(), torch.cuda.current_device()) == (stream, before)
    changed = recipe(model=make, until="20ep")
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    assert compiled(captured) == "captured"
    assert captured.digest == sf.fit(changed, out=tmp_path / "eager", operations=EAGER).digest


def test_a_launch_waits_for_what_torch_does_before_a_capture(tmp_path, monkeypatch):
    """It writes seeds, on the stream of the capture, where those of a launch go. If that came late, the
    first launch drew other numbers; here it comes late each time."""
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(graph, *of, **options):
        torch.cuda._sleep(10**9)  # half a second
        begin(graph, *of, **options)

    changed = recipe(model=make, optimizer=sf.AdamW(lr=0.01), batch=sf.Batch(30, micro=8), until="20ep")
    eager = sf.fit(changed, out=tmp_path / "eager", operations=EAGER)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    assert compiled(captured) == "captured"
    assert rows(captured) == rows(eager)
    assert captured.digest == eager.digest


def test_a_step_that_cannot_be_captured_later_is_eager_and_told(tmp_path, monkeypatch):
    real, num = Captured._capture, 0

    def fails(*of, **options):
        nonlocal num
        num += 1
        if num == 2:  # after the trial
            raise torch.OutOfMemoryError("no memory")
        return real(*of, **options)

    monkeypatch.setattr(Captured, "_capture", fails)
    changed = recipe(model=make, batch=sf.Batch(30), until="20ep")
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    (told,) = events(captured, "uncompiled")
    assert "no memory" in told["reason"]
    assert num == 3  # the other form is captured
    assert captured.digest == sf.fit(changed, out=tmp_path / "eager", operations=EAGER).digest


class Counting(torch.optim.AdamW):
    num = 0

    def step(self, closure=None):
        self.num += 1
        return super().step(closure)


def test_an_optimizer_with_a_step_of_its_own_is_not_captured(tmp_path):
    changed = recipe(model=make, optimizer=lambda g: Counting(g, lr=0.01, fused=True), until="20ep")
    built = build(changed, RunFolder(tmp_path), CAPTURED)
    for _ in run_steps(built):
        pass
    assert built.run.parts.updater.optimizer.num == 160
    assert "cannot take the guard's go-ahead" in built.notes[0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(64, 192), nn.Linear(64, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 2, 96).transpose(1, 2).chunk(3, dim=-1)
        return self.head(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).mean(1)
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("operations", [CAPTURED, EAGER], ids=["captured", "eager"])
def test_attention_repeats(tmp_path, precision, operations):
    """Over lengths at which the order of its backward pass's additions is not fixed otherwise."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 1024, 64)).astype("float32"), rng.integers(0, 3, 32)
    changed = recipe(model=Attends, data=sf.Arrays(x, y), batch=sf.Batch(8), precision=precision, until=120)
    runs = [sf.fit(changed, out=tmp_path / str(i), operations=operations) for i in range(3)]
    assert len({run.digest for run in runs}) == 1
    assert compiled(runs[0]) == ("captured" if operations is CAPTURED else "")


class Pools(nn.Module):
    """Its backward pass has no kernel that repeats."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(36, 3)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.conv(x), 3).flatten(1))


def test_what_has_no_kernel_that_repeats_is_trained_and_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 1, 8, 8)).astype("float32"), rng.integers(0, 3, 64)
    changed = recipe(model=Pools, data=sf.Arrays(x, y), until=40)
    with pytest.warns(UserWarning, match="adaptive_avg_pool2d_backward_cuda does not have a deterministic"):
        assert sf.fit(changed, out=tmp_path, operations=EAGER).status == "finished"


def test_activation_checkpointing(tmp_path):
    changed = recipe(model=Checkpointed, until="20ep")
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    assert captured.digest == sf.fit(changed, out=tmp_path / "eager", operations=EAGER).digest


def test_batches_of_many_forms(tmp_path):
    changed = recipe(model=Pooled, data=Lengths(), batch=sf.Batch(8), until="30ep")
    captured = sf.fit(changed, out=tmp_path / "captured", operations=CAPTURED)
    assert captured.digest == sf.fit(changed, out=tmp_path / "eager", operations=EAGER).digest
