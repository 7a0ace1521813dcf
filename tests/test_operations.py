"""Operations never change the result."""

import numpy as np
import pytest
import torch
from conftest import blobs, flat, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import surefoot as sf


class Rows:
    """A Python dataset with augmentation."""

    def __init__(self):
        self.x, self.y = blobs(50)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i] + np.random.normal(0, 0.1, 8).astype("float32"), "y": int(self.y[i])}


def objective(model, data):
    return torch.nn.functional.cross_entropy(model(data["x"]), data["y"], reduction="none")


BASE = {"data": sf.Dataset(Rows()), "objective": objective, "batch": sf.Batch(12), "until": "3ep"}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    workers=st.sampled_from([0, 1, 2]),
    prefetch=st.integers(1, 4),
    every=st.sampled_from([1, 4, "1ep", "30samples", "50%", "1h"]),
    keep_last=st.integers(1, 4),
    stops=st.lists(st.integers(0, 14), max_size=2),
)
def test_any_operations_and_any_interruptions_give_the_same_bits(
    tmp_path_factory, workers, prefetch, every, keep_last, stops
):
    folder = tmp_path_factory.mktemp("run")
    whole = sf.fit(recipe(**BASE), out=folder / "whole")
    operations = sf.Operations(
        data={"workers": workers, "prefetch": prefetch},
        checkpoint={"every": every, "keep_last": keep_last},
    )
    for stop in sorted(stops):
        for outcome in sf.steps(recipe(**BASE), out=folder / "parts", operations=operations):
            if outcome.step >= stop:
                break
    parts = sf.fit(recipe(**BASE), out=folder / "parts", operations=operations)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert len(sf.open_run(folder / "parts").checkpoints()) <= max(2, keep_last)


def test_compiled_equals_eager_to_rounding_and_continues_to_the_bit(tmp_path):
    changed = recipe(batch=sf.Batch(32, micro=16), until=12)
    compiled = sf.Operations(compute={"compile": "on"})
    eager = sf.fit(changed, out=tmp_path / "eager", operations=sf.Operations(compute={"compile": "off"}))
    whole = sf.fit(changed, out=tmp_path / "whole", operations=compiled)
    torch.testing.assert_close(flat(whole.model), flat(eager.model), rtol=1e-4, atol=1e-5)
    for outcome in sf.steps(changed, out=tmp_path / "parts", operations=compiled):
        if outcome.step == 5:
            break
    parts = sf.fit(changed, out=tmp_path / "parts", operations=compiled)
    assert parts.digest == whole.digest
    assert sf.open_run(tmp_path / "whole").identity["environment"]["compiled"]


def test_another_environment_is_told(tmp_path):
    for outcome in sf.steps(recipe(), out=tmp_path / "run"):
        if outcome.step == 5:
            break
    before = torch.get_num_threads()
    try:
        sf.fit(recipe(), out=tmp_path / "run", operations=sf.Operations(compute={"threads": 2}))
    finally:
        torch.set_num_threads(before)
    resumed = next(e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "resumed")
    assert resumed["environment_changed"] == {"threads": [1, 2]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"compute": {"compil": "on"}}, "Did you mean 'compute.compile'"),
        ({"compute": {"compile": "maybe"}}, "compute.compile = 'maybe'"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last = 0"),
        ({"device": 3}, "device = 3"),
        ({"data": 3}, "data = 3"),
    ],
)
def test_bad_operations_are_errors(values, says):
    with pytest.raises(sf.OperationsError) as caught:
        sf.Operations(**values)
    assert says in str(caught.value)


def test_one_sample_and_a_batch_beyond_the_data(fit):
    x, y = blobs(1)
    for batch, updates in (
        (sf.Batch(1), 5),
        (sf.Batch("full"), 5),
        (sf.Batch(10), 5),
        (sf.Batch(10, tail="pad"), 5),
    ):
        done = fit(data=sf.Arrays(x, y), batch=batch, until="5ep")
        assert (done.status, done.step) == ("finished", updates)
    assert fit(data=sf.Arrays(x, y), batch=sf.Batch(10, tail="straddle"), until="5ep").step == 1


def test_sources_of_any_shape(fit):
    x, y = blobs(40)

    class Plain:
        def __len__(self):
            return 40

        def fetch(self, ids):
            return {"in": [torch.from_numpy(x[ids])], "out": (torch.from_numpy(y[ids]),)}

    def objective(model, data):
        return torch.nn.functional.cross_entropy(model(data["in"][0]), data["out"][0], reduction="none")

    kinds = [
        fit(data=Plain(), objective=objective, batch=sf.Batch(16, micro=5)),
        fit(data=sf.Arrays(x, y), batch=sf.Batch(16, micro=5)),
        fit(
            data=sf.Arrays(a=x, b=y),
            objective=lambda m, d: torch.nn.functional.cross_entropy(m(d["a"]), d["b"], reduction="none"),
            batch=sf.Batch(16, micro=5),
        ),
    ]
    assert len({k.digest for k in kinds}) == 1
    assert torch.equal(sf.Arrays(x).fetch(np.array([3])), torch.from_numpy(x[3:4]))
