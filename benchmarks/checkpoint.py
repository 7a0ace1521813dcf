"""What checkpoints cost: 50 million parameters with AdamW's state (600 MB), at the default cadence.

    python benchmarks/checkpoint.py [--minutes 4] [--out benchmarks/results/checkpoint.json]

* share: of a training run's time. Seconds of the loop's stalls, plus what steps took longer while a
  checkpoint was being written than the median of the others, over the time from the tenth step on.
* stall: how long the loop waited for each checkpoint, beside one copy of the same tensors in memory: into
  fresh memory, into memory just used, and into memory that has lain idle for 80 s, as it does between
  checkpoints (some hosts of virtual machines take such memory away).
* others: how long `torch.save`, `safetensors.torch.save_file` and torch's DCP (`async_save`: until it
  returns, and until it is done) take for the same state. None of them hashes; only DCP syncs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf

_IDLE_S = 80.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = train(arguments.layers, arguments.minutes, Path(folder) / "run")
        result["others"] = others(arguments.layers, Path(folder))
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def model(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(layers)))


def train(layers: int, minutes: float, run: Path) -> dict[str, Any]:
    x = torch.randn(4096, 2048)
    recipe = sf.Recipe(
        model=lambda: model(layers),
        data=sf.Arrays(x, torch.randint(0, 10, (4096,))),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.AdamW(lr=1e-5),
        batch=sf.Batch(64),
        until=1_000_000,
    )
    budget = {"time": f"{60 * minutes}s"}
    done = sf.fit(recipe, out=run, operations=sf.Operations(budget=budget))
    view = sf.open_run(run)
    log = view.log()
    kept = [e for e in view.events() if e["kind"] == "checkpointed"][:-1]  # the last: at the end of the run
    ends = log["time_s"]
    writing = np.zeros(len(ends), bool)
    for event in kept:
        began = event["time"] - event["seconds"]
        writing |= (ends > began) & (ends - log["step_s"] < event["time"])
    steady = np.arange(len(ends)) >= 10
    usual = float(np.median(log["step_s"][steady & ~writing]))
    slower = float((log["step_s"][steady & writing] - usual).sum())
    stalls = [event["stall_s"] for event in kept]
    total = float(ends[-1] - ends[9])
    return {
        "parameters": sum(p.numel() for p in done.model.parameters()),
        "status": done.status,
        "steps": len(ends),
        "step_s": usual,
        "checkpoints": len(kept),
        "share": (sum(stalls) + slower) / total,
        "stalls_s": stalls,
        "slower_s": slower,
        "total_s": total,
        "written_s": [event["seconds"] for event in kept],
        **copies(done.model),
    }


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    moments = {f"{kind}.{n}": torch.rand_like(p) for kind in ("m", "v") for n, p in tensors.items()}
    return tensors | moments


def copies(module: nn.Module) -> dict[str, Any]:
    """One copy of all tensors in memory: the first, into fresh memory, later ones, and one after a rest."""
    state, times = state_of(module), []
    buffers: dict[str, torch.Tensor] = {}
    for turn in range(7):
        if turn == 6:
            time.sleep(_IDLE_S)
        began = time.perf_counter()
        for name, tensor in state.items():
            if name not in buffers:
                buffers[name] = torch.empty_like(tensor)
            buffers[name].copy_(tensor)
        times.append(time.perf_counter() - began)
    return {"copy_s": times[:6], "copy_idle_s": times[6]}


def others(layers: int, folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    state: dict[str, Any] = state_of(model(layers))
    found: dict[str, Any] = {}

    def timed(name: str, action: Any) -> None:
        times = []
        for i in range(3):
            began = time.perf_counter()
            action(folder / f"{name}{i}")
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)

    timed("torch.save", lambda path: torch.save(state, path))
    timed("safetensors", lambda path: save_file(state, path))
    timed("dcp.save", lambda path: save(state, checkpoint_id=path))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        returned, finished = [], []
        for i in range(3):
            began = time.perf_counter()
            future: Any = async_save(state, checkpoint_id=folder / f"async{i}")
            returned.append(time.perf_counter() - began)
            future.result()
            finished.append(time.perf_counter() - began)
        found["dcp.async_save returns"] = statistics.median(returned)
        found["dcp.async_save done"] = statistics.median(finished)
        torch.distributed.destroy_process_group()
    except Exception as error:  # told, not hidden
        found["dcp.async_save"] = f"not run: {error}"
    return found


if __name__ == "__main__":
    main()
