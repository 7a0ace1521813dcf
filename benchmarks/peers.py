"""Microseconds per update: surefoot beside the trainers that people use.

    python benchmarks/peers.py [--rounds 3] [--threads 1 2] [--workloads mlp cnn gpt] [--contenders ...]
                               [--out benchmarks/results/peers.json]

Makes an environment of its own, ``.venv-peers``, with `peers.txt`. Every contender trains the same model on
the same data in its own idiom: shuffled, SGD or AdamW, clipping at norm 1, a cosine rate per step, the loss
logged each step, no checkpoints and no progress bar. Each in a process of its own, in interleaved rounds;
medians. What a peer cannot do here is told, not left out. Composer asks for an older torch: here it runs on
the same as everybody, without its own requirements (`composer.txt` has what it imports), and with hollow
modules in place of torchvision and its cloud's client, neither of which is used. That each update has a
backward pass is counted, which takes everybody but surefoot some 0.2 us.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import Window

HERE = Path(__file__).parent
ROOT = HERE.parent
ENVIRONMENT = ROOT / ".venv-peers"


class DoneError(Exception):
    """All updates are timed."""


# ---------------------------------------------------------------------------------- contenders


def from_loop(name: str) -> Callable[[Any, Window], None]:
    def run(w: Any, clock: Window) -> None:
        import loop

        for done in getattr(loop, name)(w):
            if clock.tick(done):
                return

    return run


def lightning_trainer(w: Any, clock: Window) -> None:
    import lightning as L
    import torch
    import torch.nn.functional as F
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    total = w.warm + w.timed

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = w.model()

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.log("loss", loss, on_step=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch_optimizer(w, self.model)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Tick(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=total, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1,
            gradient_clip_val=1.0, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Tick()],
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True))


def fabric(w: Any, clock: Window) -> None:
    import torch
    import torch.nn.functional as F
    from lightning.fabric import Fabric
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    helper = Fabric(accelerator="cpu")
    model = w.model()
    model, optimizer = helper.setup(model, torch_optimizer(w, model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, w.warm + w.timed)
    loader = helper.setup_dataloaders(
        DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True)
    )
    losses = []
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            helper.backward(loss)
            helper.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if clock.tick():
                return


def accelerate(w: Any, clock: Window) -> None:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    helper = Accelerator(cpu=True)
    model = w.model()
    optimizer = torch_optimizer(w, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, w.warm + w.timed)
    loader = DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True)
    model, optimizer, loader, schedule = helper.prepare(model, optimizer, loader, schedule)
    losses = []
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            helper.backward(loss)
            helper.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if clock.tick():
                return


def huggingface_trainer(w: Any, clock: Window) -> None:
    import torch
    import torch.nn.functional as F
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from workloads import torch_optimizer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = w.model()

        def forward(self, x: Any, labels: Any) -> Any:
            return {"loss": F.cross_entropy(self.model(x), labels)}

    class Pairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __init__(self) -> None:
            self.x, self.y = w.data()

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> Any:
            return {"x": self.x[i], "labels": self.y[i]}

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    total, model = w.warm + w.timed, Model()
    optimizer = torch_optimizer(w, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=total, per_device_train_batch_size=w.batch, logging_steps=1,
            max_grad_norm=1.0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Pairs(), optimizers=(optimizer, schedule), callbacks=[Tick()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def ignite(w: Any, clock: Window) -> None:
    import torch
    import torch.nn.functional as F
    from ignite.engine import Engine, Events
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    model = w.model()
    optimizer = torch_optimizer(w, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, w.warm + w.timed)

    def step(engine: Any, batch: Any) -> float:
        x, y = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    losses: list[float] = []
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output))

    def tick(running: Any) -> None:
        if clock.tick():
            running.terminate()

    engine.add_event_handler(Events.ITERATION_COMPLETED, tick)
    loader = DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True)
    engine.run(loader, max_epochs=10_000)


def skorch(w: Any, clock: Window) -> None:
    import torch
    from skorch import NeuralNet
    from skorch.callbacks import Callback, GradientNormClipping, LRScheduler

    class Tick(Callback):
        def on_batch_end(self, net: Any, **_: Any) -> None:
            if clock.tick():
                raise DoneError

    sgd = w.optimizer == "sgd"
    net = NeuralNet(
        w.model, torch.nn.CrossEntropyLoss, batch_size=w.batch, iterator_train__shuffle=True, lr=w.lr,
        optimizer=torch.optim.SGD if sgd else torch.optim.AdamW, max_epochs=10_000, train_split=None,
        callbacks=[
            GradientNormClipping(1.0), Tick(),
            LRScheduler("CosineAnnealingLR", T_max=w.warm + w.timed, step_every="batch"),
        ],
        callbacks__print_log=None, **({"optimizer__momentum": 0.9} if sgd else {}),
    )  # fmt: skip
    with contextlib.suppress(DoneError):
        net.fit(*w.data())


def composer(w: Any, clock: Window) -> None:
    import torch
    import torch.nn.functional as F
    import torchmetrics  # noqa: F401  # looks for torchvision, which must not be found

    sys.meta_path.append(Hollow())
    from composer import Callback, ComposerModel, Trainer
    from composer.algorithms import GradientClipping
    from composer.loggers import InMemoryLogger
    from composer.optim import CosineAnnealingScheduler
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = w.model()

        def forward(self, batch: Any) -> torch.Tensor:
            return self.model(batch[0])

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return F.cross_entropy(outputs, batch[1])

    class Tick(Callback):
        def batch_end(self, *_: Any) -> None:
            clock.tick()

    model = Model()
    trainer = Trainer(
        model=model, device="cpu", max_duration=f"{w.warm + w.timed}ba", progress_bar=False,
        train_dataloader=DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True),
        optimizers=torch_optimizer(w, model), schedulers=CosineAnnealingScheduler(),
        step_schedulers_every_batch=True, algorithms=[GradientClipping("norm", 1.0)],
        loggers=[InMemoryLogger()], callbacks=[Tick()],
    )  # fmt: skip
    trainer.fit()


def keras(w: Any, clock: Window) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as K
    import torch

    class Logits(torch.nn.Module):
        """With the classes last, as Keras has them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = w.model()

        def forward(self, x: Any) -> Any:
            out = self.model(x)
            return out.transpose(1, 2) if out.ndim == 3 else out

    class Tick(K.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if clock.tick():
                raise DoneError

    x, y = (t.numpy() for t in w.data())
    rate = K.optimizers.schedules.CosineDecay(w.lr, w.warm + w.timed)
    of = K.optimizers.SGD if w.optimizer == "sgd" else K.optimizers.AdamW
    options = {"momentum": 0.9} if w.optimizer == "sgd" else {}
    model = K.Sequential([K.layers.TorchModuleWrapper(Logits())])
    loss = K.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=of(rate, global_clipnorm=1.0, **options), loss=loss)
    with contextlib.suppress(DoneError):
        model.fit(x, y, batch_size=w.batch, epochs=10_000, verbose=0, callbacks=[Tick()])


def fastai(w: Any, clock: Window) -> None:
    from functools import partial

    from fastai.callback.core import Callback, CancelFitException, CancelValidException
    from fastai.callback.schedule import ParamScheduler, SchedCos
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import SGD, Adam
    from torch import nn
    from torch.utils.data import TensorDataset

    class Tick(Callback):
        def after_batch(self) -> None:
            if clock.tick():
                raise CancelFitException

        def before_validate(self) -> None:  # nobody else validates, and its batches would be counted
            raise CancelValidException

    data = TensorDataset(*w.data())
    loader = DataLoader(data, bs=w.batch, shuffle=True, num_workers=0)
    per_epoch = -(-len(data) // w.batch)
    epochs = -(-(w.warm + w.timed) // per_epoch)
    learner = Learner(
        DataLoaders(loader, loader), w.model(), loss_func=nn.CrossEntropyLoss(), lr=w.lr,
        opt_func=partial(SGD, mom=0.9) if w.optimizer == "sgd" else partial(Adam, decouple_wd=True),
        cbs=[GradientClip(1.0), Tick(), ParamScheduler({"lr": SchedCos(w.lr, 0.0)})],
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs, cbs=[])


class Hollow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules without contents, of which any name is an empty class."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        hollow = name.split(".")[0] in ("torchvision", "mcli")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if hollow else None

    def exec_module(self, module: types.ModuleType) -> None:
        def empty(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty  # type: ignore[method-assign]


CONTENDERS: dict[str, Callable[[Any, Window], None]] = {
    "loop": from_loop("loop"),
    "bare": from_loop("bare"),
    "surefoot": from_loop("surefoot"),
    "surefoot-fused": from_loop("surefoot_fused"),
    "surefoot-compiled": from_loop("surefoot_compiled"),
    "surefoot-tuned": from_loop("surefoot_tuned"),
    "surefoot-bf16": from_loop("surefoot_bf16"),
    "lightning": lightning_trainer,
    "fabric": fabric,
    "composer": composer,
    "huggingface": huggingface_trainer,
    "accelerate": accelerate,
    "ignite": ignite,
    "skorch": skorch,
    "keras": keras,
    "fastai": fastai,
}

# ---------------------------------------------------------------------------------- rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", default=["mlp", "cnn", "gpt"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(one(*arguments.one, threads=arguments.threads[0]))
        return
    python = environment()
    results = []
    for threads in arguments.threads:
        for workload in arguments.workloads:
            results.append(compare(python, workload, threads, arguments.rounds, arguments.contenders))
            if arguments.out:
                machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "versions": versions(python)}
                found = {"machine": machine, "results": results}
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def environment() -> Path:
    """Python of the peers' environment, made if need be."""
    python = ENVIRONMENT / "bin" / "python"
    asked = "".join((HERE / name).read_text() for name in ("peers.txt", "composer.txt"))
    ready = ENVIRONMENT / ".ready"
    if not ready.exists() or ready.read_text() != asked:
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = [
            line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch==")
        ]
        subprocess.run([*install, *pins, "setuptools"], check=True)
        subprocess.run([*install, *pins, "-r", str(HERE / "peers.txt")], check=True)
        subprocess.run([*install, "--no-deps", "-r", str(HERE / "composer.txt")], check=True)
        # fastai asks for torchvision, whose usual build does not fit torch's for CPUs; nothing here uses it
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", "torchvision"], check=True)
        subprocess.run([*install, "--no-build-isolation", "-e", str(ROOT)], check=True)
        ready.write_text(asked)
    return python


def versions(python: Path) -> dict[str, str]:
    """Of torch and the peers."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    wanted = {"torch", "mosaicml", *(HERE / "peers.txt").read_text().split()}
    return {p["name"]: p["version"] for p in json.loads(listed.stdout) if p["name"].lower() in wanted}


def one(workload: str, contender: str, *, threads: int) -> float:
    """Microseconds per update."""
    import torch
    from workloads import WORKLOADS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = Window(WORKLOADS[workload].warm, WORKLOADS[workload].timed)
    backward, num_backward = torch.Tensor.backward, 0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal num_backward
        num_backward += 1
        backward(*arguments, **options)

    torch.Tensor.backward = counted  # type: ignore[method-assign]
    CONTENDERS[contender](WORKLOADS[workload], clock)
    if not clock.us:
        raise RuntimeError(f"{contender} ended after {clock.done} updates")
    if num_backward < clock.done and not contender.startswith("surefoot"):
        raise RuntimeError(
            f"{contender}: {num_backward} backward passes in what counts as {clock.done} updates"
        )
    return clock.us


def compare(
    python: Path, workload: str, threads: int, rounds: int, contenders: list[str]
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    from loop import TUNED, with_tuned

    variables = {**with_tuned(python, workload, threads, contenders), "HF_HUB_OFFLINE": "1"}
    for turn in range(rounds):
        for name in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            if name in failed:
                continue
            command = [str(python), __file__, "--one", workload, name, "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=1800)
            if done.returncode:
                failed[name] = (done.stderr.strip().splitlines() or ["?"])[-1]
                continue
            times[name].append(float(done.stdout.split()[-1]))
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    print(f"{workload}, {threads} thread(s): us per update, x loop, x surefoot, x surefoot-compiled")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        against = [
            f"{value / medians[c]:.2f}" if c in medians else "-"
            for c in ("loop", "surefoot", "surefoot-compiled")
        ]
        print(f"  {name:18} {value:10.0f}  " + "  ".join(f"{a:>6}" for a in against), flush=True)
    for name, why in failed.items():
        print(f"  {name:18} not run: {why}", flush=True)
    return {
        "workload": workload, "threads": threads, "us_per_update": medians, "rounds": times,
        "not_run": failed, "tuned": variables.get(TUNED),
    }  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
