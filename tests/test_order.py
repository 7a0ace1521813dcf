"""The order of samples: a bijection, well mixed, without state, and proved by the ledger."""

import copy
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import blobs, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import surefoot as sf
from surefoot.data.feed import Feed
from surefoot.data.order import ALGORITHM, Order, Permutation, sorting
from surefoot.data.plan import Cadence, Plan
from surefoot.data.pool import Pool
from surefoot.data.sources import Arrays
from surefoot.errors import DataError, RecipeError
from surefoot.keys import key, seed_of, word, words
from surefoot.record.ledger import Ledger
from surefoot.types import HOLE, duration

SIZES = st.one_of(st.integers(1, 300), st.integers(65_530, 70_000), st.integers(10**6, 10**6 + 50))
LEVEL = 1e-6  # of each test below: keys are fixed, so it fails always or never


def order(n, seed=0, epoch=0):
    return Permutation(n, key(seed, "order", epoch))(np.arange(n))


@settings(max_examples=40, deadline=None)
@given(n=SIZES, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_it_is_a_bijection_with_an_inverse(n, seed, epoch):
    permutation = Permutation(n, key(seed, "order", epoch))
    ids = permutation(np.arange(n))
    assert np.array_equal(np.sort(ids), np.arange(n))
    assert np.array_equal(permutation.inverse(ids), np.arange(n))


@settings(max_examples=20)
@given(n=st.integers(65_537, 10**9), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_hashes_are_the_same_looked_up_and_computed(n, seed, data):
    looked_up, computed = (Permutation(n, key(seed, "order", 0)) for _ in range(2))
    computed._tables = []
    start = data.draw(st.integers(0, n - 100))
    positions = np.arange(start, start + 100)
    assert np.array_equal(looked_up(positions), computed(positions))
    assert np.array_equal(looked_up.inverse(positions), computed.inverse(positions))


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([0, 15, 16, 17, 40, 62]), st.booleans())
def test_hashes_are_sorted_as_by_a_stable_sort(numbers, shift, low):
    """Where some are equal, in part or as a whole, too."""
    hashes = np.array(numbers, np.uint64) << np.uint64(shift)
    if low:
        hashes += np.arange(len(hashes), dtype=np.uint64)[::-1]
    assert np.array_equal(sorting(hashes), np.argsort(hashes, kind="stable"))


@settings(max_examples=40, deadline=None)
@given(n=SIZES, data=st.data())
def test_any_stretch_is_what_the_whole_says(n, data):
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, min(n, start + 3000)))
    stretch = Order(n, seed=3, shuffle=True).take(5, start, stop)
    assert np.array_equal(stretch, order(n, 3, 5)[start:stop])


def in_main_thread():
    return threading.get_ident() == threading.main_thread().ident


@pytest.fixture
def made(monkeypatch):
    """(by the main thread, epoch, chunk) of all that is made, of any size, in a process with two cores."""
    seen, make = [], Order._made

    def told(self, epoch, index):
        seen.append((in_main_thread(), epoch, index))
        return make(self, epoch, index)

    monkeypatch.setattr(Order, "_made", told)
    monkeypatch.setattr("surefoot.data.order._WORTH_WHILE", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    return seen


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    n=SIZES,
    places=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.booleans()), min_size=1, max_size=9),
)
def test_ids_that_are_made_ahead_are_the_same(made, n, places):
    """Wherever one jumps to meanwhile."""
    taken = Order(n, seed=5, shuffle=True)
    for epoch, share, ahead in places:
        start = int(share * (n - 1))
        expected = order(n, seed=5, epoch=epoch)[start : start + 70_000]
        assert np.array_equal(taken.take(epoch, start, start + len(expected), ahead=ahead), expected)


@pytest.mark.parametrize("tail", ["keep", "drop", "straddle"])
def test_each_next_chunk_is_made_by_another_thread(made, monkeypatch, tail):
    plan, num = Plan(100_000, 64, tail=tail, seed=3), 3 * 1562 if tail == "drop" else 3 * 1563 - 4
    batches = Feed(Arrays(torch.arange(100_000)), plan, 0, torch.device("cpu")).batches(0, num)
    read = torch.cat([batch.data for batch in batches])
    plan._order._next.result()
    places = [place for _, *place in made]
    assert places == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0]]
    assert [by_main for by_main, *_ in made] == [True, *[False] * 6]
    assert torch.equal(read, torch.cat([torch.tensor(plan.ids(step)) for step in range(num)]))
    made.clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    Order(100_000, seed=3, shuffle=True).take(0, 0, 9, ahead=True)
    assert len(made) == 1


@pytest.mark.parametrize("trouble", ["no thread", "no memory"])
def test_what_cannot_be_made_ahead_is_made_when_it_is_asked_for(made, monkeypatch, trouble):
    ahead, make, complaints = Order(80_000, seed=1, shuffle=True), Order._made, []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    def fails(self, *place):
        if not in_main_thread():
            raise MemoryError
        return make(self, *place)

    def no_more(*task):
        raise RuntimeError("can't start new thread")

    if trouble == "no thread":
        monkeypatch.setattr("surefoot.data.meanwhile.start_new_thread", no_more)
    else:
        monkeypatch.setattr(Order, "_made", fails)
    for start in (0, 70_000):
        expected = order(80_000, seed=1)[start : start + 9]
        assert np.array_equal(ahead.take(0, start, start + 9, ahead=True), expected)
    assert [by_main for by_main, *_ in made] == [True] * 2
    assert complaints == []  # who asked has its ids


def test_a_process_forked_while_another_thread_makes_ids_goes_on_by_itself(made, monkeypatch):
    taken, make, go_on = Order(80_000, seed=1, shuffle=True), Order._made, threading.Event()

    def slowly(self, *place):
        if not in_main_thread():
            go_on.wait(60)
        return make(self, *place)

    monkeypatch.setattr(Order, "_made", slowly)
    taken.take(0, 0, 9, ahead=True)
    child = os.fork()
    if child == 0:  # its `go_on` is never set
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        right = np.array_equal(taken.take(0, 70_000, 70_009), order(80_000, seed=1)[70_000:70_009])
        go_on.set()
        taken.take(1, 0, 9, ahead=True)  # by a thread of its own
        right &= np.array_equal(taken.take(1, 70_000, 70_009), order(80_000, 1, 1)[70_000:70_009])
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()
    assert np.array_equal(taken.take(0, 70_000, 70_009), order(80_000, seed=1)[70_000:70_009])


def test_runs_leave_no_thread_behind(made, fit):
    def count():
        return len(os.listdir("/proc/self/task"))

    gc.disable()
    try:
        fit(data=sf.Arrays(*blobs(500)), until=40)  # torch's own threads begin
        before = count()
        for _ in range(5):
            fit(data=sf.Arrays(*blobs(500)), until=40)
        assert False in {by_main for by_main, *_ in made}
        until = time.monotonic() + 60
        while count() > before:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        gc.enable()


def test_a_process_ends_that_asks_for_ids_until_its_very_end():
    code = """
import builtins
from surefoot.data.plan import Plan

class Last:
    plan = Plan(200_000, 64, seed=5)

    def __del__(self):
        for first in range(0, 3000, 32):
            self.plan.whole(first, first + 32)
        print("read")

builtins.last = Last()  # it goes when no thread runs any more
builtins.last.plan.whole(0, 32)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.parametrize("moment", ["as it begins", 2e-3, 4e-3, 8e-3])
def test_a_process_ends_whenever_a_signal_comes(moment):
    """Nothing waits for the other thread then."""
    code = f"""
import os, signal
from surefoot.data import meanwhile
from surefoot.data.plan import Plan

start, moment, plan = meanwhile.start_new_thread, {moment!r}, Plan(2_000_000, 64, seed=5)

def interrupted(*of):
    start(*of)
    os.kill(os.getpid(), signal.SIGINT)

for number in (signal.SIGINT, signal.SIGALRM):  # whatever was inherited
    signal.signal(number, signal.default_int_handler)
if isinstance(moment, float):
    signal.setitimer(signal.ITIMER_REAL, moment)
else:
    meanwhile.start_new_thread = interrupted
for first in range(0, 31_000, 32):
    plan.whole(first, first + 32)
signal.pause()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr


def test_an_order_can_be_copied_while_another_thread_makes_ids(made):
    for seed in range(20):
        plan = Plan(131_072, 64, tail="straddle", seed=seed)
        for epoch in range(1, 5):
            plan.whole(2048 * epoch - 30, 2048 * epoch - 29)  # the next is of another epoch
            for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
                assert np.array_equal(again.ids(2048 * epoch), plan.ids(2048 * epoch))


def test_it_is_noticed_if_a_tensor_of_the_source_is_resized():
    """Not one of the caller, with which it has memory in common, but no shape."""
    x, y = torch.randn(20_000, 16), torch.zeros(20_000, dtype=torch.int64)
    feed = Feed(Arrays(x, y), Plan(20_000, 64, seed=1), 1, torch.device("cpu"))
    batches = feed.batches(0, 300)
    next(batches)
    feed.source.arrays()[0].resize_(2000, 16)
    with pytest.raises(DataError, match="has 2,000 samples now, and had 20,000"):
        list(batches)


def test_quantised_arrays_are_gathered(threads):
    threads(1)
    x = torch.quantize_per_tensor(torch.randn(4096, 64), 0.1, 0, torch.quint8)
    plan = Plan(4096, 64, seed=1)
    for batch in Feed(Arrays(x), plan, 1, torch.device("cpu")).batches(0, 200):
        right = x.index_select(0, torch.from_numpy(batch.slots.ids))
        assert torch.equal(batch.data.int_repr(), right.int_repr())


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_small_orders_are_uniform(n):
    index = {p: i for i, p in enumerate(itertools.permutations(range(n)))}
    counts = np.zeros(len(index))
    for seed in range(60 * len(index)):
        counts[index[tuple(order(n, seed))]] += 1
    assert scipy.stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("n", [1000, 70_000])
def test_first_positions_are_uniform(n):
    first = [Permutation(n, key(s, "order", 0))(np.arange(1))[0] for s in range(4000)]
    counts, _ = np.histogram(first, bins=20, range=(0, n))
    assert scipy.stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize(("n", "keys"), [(1024, 400), (70_000, 40)])
def test_neighbours_stay_neighbours_as_often_as_chance_has_it(n, keys):
    """The test that a Feistel network of four rounds fails (mean 2.96 for 2.00)."""
    adjacent = sum(int((np.abs(np.diff(order(n, s))) == 1).sum()) for s in range(keys))
    expected = 2 * (n - 1) / n * keys
    assert abs(adjacent - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize(("n", "keys"), [(1024, 400), (70_000, 40)])
def test_fixed_points_are_poisson(n, keys):
    fixed = sum(int((order(n, s) == np.arange(n)).sum()) for s in range(keys))
    assert abs(fixed - keys) < 5 * np.sqrt(keys)


@pytest.mark.parametrize("n", [4096, 70_000])
@pytest.mark.parametrize("pair", ["position-value", "lag one", "epoch-epoch"])
def test_pairs_fill_a_grid_evenly(n, pair):
    grid, cells = np.zeros((32, 32)), 0
    for seed in range(max(1, 400_000 // n)):
        ids = order(n, seed)
        a, b = {
            "position-value": (np.arange(n), ids),
            "lag one": (ids[:-1], ids[1:]),
            "epoch-epoch": (ids, order(n, seed, 1)),
        }[pair]
        np.add.at(grid, (a * 32 // n, b * 32 // n), 1)
        cells += len(a)
    statistic = ((grid - cells / 1024) ** 2 / (cells / 1024)).sum()
    p = scipy.stats.chi2.sf(statistic, 31 * 31)  # both margins are fixed
    assert LEVEL < p < 1 - LEVEL


@pytest.mark.parametrize("n", [2000, 100_000])
def test_ranks_do_not_correlate(n):
    orders = [order(n, seed, epoch) for seed in range(3) for epoch in range(3)]
    bound = 5 / np.sqrt(n)
    for one, other in itertools.combinations([np.arange(n), *orders], 2):
        assert abs(scipy.stats.spearmanr(one, other).statistic) < bound


def test_batches_of_sorted_labels_are_hypergeometric():
    n, batch, classes = 20_000, 100, 10
    labels = order(n) * classes // n
    counts = np.array([np.bincount(b, minlength=classes) for b in labels.reshape(-1, batch)])
    expected, shrink = batch / classes, (n - batch) / (n - 1)
    statistic = ((counts - expected) ** 2 / expected).sum() / shrink
    p = scipy.stats.chi2.sf(statistic, len(counts) * (classes - 1))
    assert LEVEL < p < 1 - LEVEL


def test_no_two_seeds_and_epochs_share_an_order():
    seen = {tuple(order(50, seed, epoch)) for seed in range(40) for epoch in range(40)}
    assert len(seen) == 1600
    assert len({key(a, "order", b) for a in range(300) for b in range(300)}) == 90_000
    assert key("1", 2) != key(1, 2) != key(12) != key("1", "2")


@given(draws=st.integers(0, 2**64 - 1), step=st.integers(0, 2**40), micro=st.integers(0, 9))
def test_seeds_that_are_made_for_many_steps_are_those_of_each(draws, step, micro):
    assert seed_of(draws, step, micro) == word(word(draws, step), micro)


def test_golden_vectors():
    """The order is part of the format: runs must find it again in years."""
    assert ALGORITHM == "argsort-feistel12-v1"
    assert key(0, "order", 0) == GOLDEN["key"]
    assert words(7, np.arange(3)).tolist() == [word(7, i) for i in range(3)] == GOLDEN["words"]
    assert order(10).tolist() == GOLDEN["order 10"]
    assert order(100_000)[:5].tolist() == GOLDEN["order 100000"]


GOLDEN = {
    "key": 7015467385253835249,
    "words": [9672475392221035855, 5573481420429128725, 17358316652931856208],
    "order 10": [6, 5, 7, 3, 8, 4, 1, 9, 2, 0],
    "order 100000": [27360, 19309, 17481, 56427, 76671],
}

# ------------------------------------------------------------------------------------ the plan


@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from(["keep", "pad", "drop", "straddle"]),
    st.booleans(),
    st.integers(0, 40),
    st.integers(1, 12),
)
def test_whole_batches_are_planned_together_as_one_by_one(n, batch, tail, shuffle, first, num):
    plan = Plan(n, min(batch, n), tail, shuffle)
    one_by_one = [plan.at(step) for step in range(first, first + num)]
    short = [s.step for s in one_by_one if s.num_samples < plan.batch_size]
    found = plan.next_short(first)
    assert short[:1] == [found] if short else found is None or found >= first + num
    one_by_one = one_by_one[: short[0] - first if short else num]
    if one_by_one:
        slots, ids = plan.whole(first, first + len(one_by_one))
        assert [(s.step, s.epoch, str(s.epochs), s.num_samples) for s in slots] == [
            (s.step, s.epoch, str(s.epochs), s.num_samples) for s in one_by_one
        ]
        assert [s.ids.tolist() for s in slots] == [s.ids.tolist() for s in one_by_one]
        assert ids.tolist() == [i for s in one_by_one for i in s.ids.tolist()]


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 80),
    tail=st.sampled_from(["keep", "drop", "straddle", "pad"]),
    shuffle=st.booleans(),
)
def test_every_epoch_has_every_sample_once(n, batch, tail, shuffle):
    if tail == "drop" and batch > n:
        with pytest.raises(RecipeError, match="leaves no batch"):
            Plan(n, batch, tail)
        return
    plan = Plan(n, batch, tail, shuffle, seed=5)
    epochs: dict[int, list[int]] = {}
    consumed = 0
    for step in range(int(4 * plan.updates_per_epoch) + 2):
        slots = plan.at(step)
        real = slots.ids[slots.ids != HOLE]
        consumed += len(real)
        assert len(real) == slots.num_samples >= 1
        assert plan.samples(step + 1) == consumed
        assert np.array_equal(plan.ids(step), slots.ids)
        if tail in ("pad", "straddle", "drop"):
            assert len(slots.ids) == batch
        owners = slots.epochs if slots.epochs is not None else [slots.epoch] * len(slots.ids)
        for i, epoch in zip(slots.ids.tolist(), owners, strict=True):
            if i != HOLE:
                epochs.setdefault(int(epoch), []).append(i)
    for epoch in range(3):
        ids = epochs[epoch]
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(range(n))
        assert len(ids) == (n // batch * batch if tail == "drop" else n)
        if not shuffle:
            assert ids == list(range(len(ids)))


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 50),
    batch=st.integers(1, 60),
    tail=st.sampled_from(["keep", "straddle", "pad"]),
    samples=st.integers(1, 400),
    epochs=st.integers(1, 9),
)
def test_durations_end_with_the_update_that_completes_them(n, batch, tail, samples, epochs):
    plan = Plan(n, batch, tail)
    updates = plan.updates(duration(f"{samples}samples"), of=None, name="until")
    assert plan.samples(updates) >= samples > plan.samples(updates - 1)
    updates = plan.updates(duration(f"{epochs}ep"), of=None, name="until")
    assert plan.epochs(updates) >= epochs > plan.epochs(updates - 1)


@given(st.fractions(min_value="0.3", max_value=20), st.integers(0, 200))
def test_a_cadence_is_due_when_a_multiple_is_completed(period, done):
    due = [s for s in range(1, 300) if s // period > (s - 1) // period]
    assert Cadence(period).after(done) == next(s for s in due if s > done)


def test_the_ledger_proves_the_order(fit):
    done = fit(until="3ep")
    view = sf.open_run(done.run_dir)
    ledger = Ledger()
    for step in range(done.step):
        ledger.extend(step, view.plan.ids(step))
    assert ledger.value == done.ledger
    assert fit(until="3ep", seed=1).ledger != done.ledger
    other = Ledger()
    for step in range(done.step):
        other.extend(step, view.plan.ids(step)[::-1].copy())
    assert other.value != done.ledger


class Counting(sf.Arrays):
    calls = 0

    def fetch(self, ids):
        type(self).calls += 1
        return super().fetch(ids)


def test_arrays_are_gathered_once_per_batch(fit):
    done = fit(data=Counting(*blobs(100)), batch=sf.Batch(10, micro=2), until="3ep")
    assert Counting.calls == done.step == 30


def test_neither_workers_nor_prefetch_change_anything(tmp_path):
    x, y = blobs(50)

    class Rows:
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return x[i] + np.random.normal(), int(y[i])

    seen = set()
    for workers, prefetch in [(0, 2), (1, 1), (2, 2), (3, 5)]:
        for tail in ("keep",):
            done = sf.fit(
                recipe(data=sf.Dataset(Rows()), batch=sf.Batch(8, tail=tail)),
                out=tmp_path / f"{workers}{tail}",
                operations=sf.Operations(data={"workers": workers, "prefetch": prefetch}),
            )
            seen.add((done.digest, done.ledger))
    assert len(seen) == 1


@given(
    st.integers(1, 300), st.sampled_from([1, 3, 8, 16, 32]), st.sampled_from(["keep", "straddle", "pad"]),
    st.integers(0, 60), st.integers(0, 60),
)  # fmt: skip
def test_batches_gathered_together_are_those_of_each_step(n, size, tail, start, length):
    """And where one begins in memory, within a cache line, depends on nothing but that it begins one."""
    x = np.arange(n * 16, dtype="float32").reshape(n, 16)
    source = Arrays(x, np.repeat(np.arange(n)[:, None], 8, axis=1))
    feed = Feed(source, Plan(n, size, tail, seed=3), 0, torch.device("cpu"))
    got = list(feed.batches(start, start + length))
    assert [b.slots.step for b in got] == list(range(start, start + length))
    for batch in got:
        alone = feed.at(batch.slots.step)
        assert batch.slots.ids.tolist() == alone.slots.ids.tolist()
        assert all(torch.equal(a, b) for a, b in zip(batch.data, alone.data, strict=True))
        assert (batch.weights is None) == (alone.weights is None)
        assert all(a.data_ptr() % 64 == 0 for a in batch.data)


def test_only_short_batches_are_gathered_by_themselves(monkeypatch):
    alone, at = [], Feed.at
    monkeypatch.setattr(Feed, "at", lambda self, step: alone.append(step) or at(self, step))
    feed = Feed(Arrays(torch.zeros(100, 16)), Plan(100, 8, "keep"), 0, torch.device("cpu"))
    got = list(feed.batches(5, 80))
    assert [b.num_rows for b in got].count(4) == 6
    assert alone == [12, 25, 38, 51, 64, 77]


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.sampled_from([(), (1,), (3,), (0,), (2, 4), (64,)]),
            st.sampled_from(["plain", "turned", "strided", "conjugate", "negative", "numpy", "expanded"]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 40),
)
def test_gathered_are_the_bytes_of_the_rows(threads, num_threads, kinds, n):
    """Whatever the arrays hold, and however they lie in memory, with torch's kernel and with numpy's."""
    threads(num_threads)
    arrays = []
    for dtype, shape, kind in kinds:
        raw = torch.randint(0, 256, (n, *shape, dtype.itemsize), dtype=torch.uint8)
        array = (raw & 1).bool()[..., 0] if dtype is torch.bool else raw.view(dtype)[..., 0]
        if kind == "turned" and array.ndim > 1:
            array = array.transpose(0, -1).contiguous().transpose(0, -1)
        elif kind == "strided":
            array = array.repeat_interleave(2, 0)[::2]
        elif kind == "conjugate" and dtype.is_complex:
            array = array.conj()
        elif kind == "negative" and dtype.is_complex:
            array = array.conj().imag
        elif kind == "numpy" and dtype is not torch.bfloat16:
            array = array.numpy()
        elif kind == "expanded":
            array = array[:1].expand_as(array)
        arrays.append(array)
    source = Arrays(*arrays)
    pool = Pool(source.arrays(), 2 * n)
    for turn in range(4):  # into fresh memory, and into memory used before
        ids = np.random.default_rng(turn).integers(0, n, 2 * n - turn % 2)
        right = [t.index_select(0, torch.from_numpy(ids)) for t in source.arrays()]
        assert all(map(_same_bytes, pool.gather(ids), right))


def _same_bytes(a, b):
    bits = [t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_arrays_that_move_to_shared_memory_are_followed(threads, num_threads):
    threads(num_threads)
    x, others = torch.randn(5000, 16), []
    feed = Feed(Arrays(x), Plan(5000, 64, seed=3), 0, torch.device("cpu"))
    for batch in feed.batches(0, 200):
        if batch.slots.step == 20:
            x.share_memory_()
        others.append(torch.full_like(x, 7.0))  # where it was before
        del others[:-4]
        assert torch.equal(batch.data, x[batch.slots.ids.copy()])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_arrays_are_refused(layout):
    with pytest.raises(sf.DataError, match=r"array 0 is sparse .*(?s:.)*to_dense"):
        Arrays(torch.eye(8).to_sparse(layout=layout), np.arange(8))


@pytest.mark.parametrize("size", [63, 64])
def test_a_model_may_change_its_batch_in_place(fit, size):
    class Scales(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.net = torch.nn.Parameter(torch.ones(8)), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.net(x.mul_(self.scale))

    x, y = blobs(64 * 40)
    done = fit(model=Scales, data=Arrays(x, y), batch=sf.Batch(size), until=100)
    assert done.status == "finished"


class Doubled(Arrays):
    def fetch(self, ids):
        return super().fetch(ids) * 2


def test_a_class_derived_from_arrays_fetches_its_own_way():
    x = torch.arange(64 * 16, dtype=torch.float32).reshape(64, 16)
    feed = Feed(Doubled(x), Plan(64, 4, seed=3), 0, torch.device("cpu"))
    for batch in feed.batches(0, 20):
        assert torch.equal(batch.data, 2 * x[batch.slots.ids])


@given(st.lists(st.sampled_from(["nothing", "batch", "view", "array", "graph"]), min_size=80, max_size=80))
def test_memory_that_somebody_has_is_not_gathered_into(keeps):
    """Batches are gathered into memory used before, but never while a view of it is left anywhere."""
    weight = torch.ones(16, requires_grad=True)
    x = torch.arange(512 * 16, dtype=torch.float32).reshape(512, 16)
    feed = Feed(Arrays(x), Plan(512, 8, seed=3), 0, torch.device("cpu"))
    kept, places = [], set()

    def gradient(total):
        return torch.autograd.grad(total, weight)[0]

    for keep, batch in zip(keeps, feed.batches(0, len(keeps)), strict=True):
        right = x[batch.slots.ids]
        places.add(batch.data.untyped_storage().data_ptr())
        assert torch.equal(batch.data, right)
        if keep == "batch":
            kept.append((batch, lambda b: b.data, right))
        elif keep == "view":
            kept.append((batch.data[3:, 2:], lambda v: v, right[3:, 2:]))
        elif keep == "array":
            kept.append((batch.data.numpy(), torch.from_numpy, right))
        elif keep == "graph":  # whose backward pass needs the batch
            kept.append(((batch.data * weight).sum(), gradient, right.sum(0)))
    for value, read, right in kept:
        assert torch.equal(read(value), right)
    if not kept:
        assert len(places) <= 4  # and used again it is


def test_memory_that_another_process_has_is_not_gathered_into():
    x = torch.arange(512 * 16, dtype=torch.float32).reshape(512, 16)
    feed = Feed(Arrays(x), Plan(512, 8, seed=3), 0, torch.device("cpu"))
    queue, right = torch.multiprocessing.get_context("fork").SimpleQueue(), []
    for step, batch in enumerate(feed.batches(0, 300)):
        if step < 3:
            queue.put(batch.data)
            right.append(x[batch.slots.ids])
        del batch
    assert all(torch.equal(queue.get(), one) for one in right)
