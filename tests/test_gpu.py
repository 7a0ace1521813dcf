"""What only a GPU can show. Marked `gpu`: run where torch sees one."""

import pytest
import torch
from conftest import recipe
from torch import nn

import surefoot as sf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]


def make():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


SPECS = [sf.SGD(lr=0.1, momentum=0.9, fused=True), sf.AdamW(lr=0.01, fused=True)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_continues_to_the_bit(tmp_path, spec, precision):
    changed = recipe(
        model=make, optimizer=spec, precision=precision, batch=sf.Batch(32, micro=8), until="6ep"
    )
    whole = sf.fit(changed, out=tmp_path / "whole")
    for stop in (5, 17, 18):
        for outcome in sf.steps(changed, out=tmp_path / "parts"):
            if outcome.step == stop:
                break
    parts = sf.fit(changed, out=tmp_path / "parts")
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert "cuda" in sf.open_run(parts.run_dir).identity["environment"]["device"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_a_step_never_waits_for_the_device(tmp_path, spec):
    changed = recipe(model=make, optimizer=spec, gradient=(sf.clip_norm(1.0),), until="6ep")
    operations = sf.Operations(checkpoint={"every": "1h"})
    try:
        for outcome in sf.steps(changed, out=tmp_path / "run", operations=operations):
            if outcome.step == 10:
                torch.cuda.set_sync_debug_mode("error")
            if outcome.step == 40:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
