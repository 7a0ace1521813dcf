"""The whole step as one CUDA graph: what `train_step` does on a GPU, captured once, and launched as one.

A small step on a GPU is many kernels of about a microsecond, each of which takes the host longer to launch.
Those of a graph are the ones of eager mode, so its steps should have the same bits; what is known of that
is in docs/decisions/0020. What changes from step to step lies where the graph reads it: the batch, the
rates, the seed of its random numbers, and the limits within which the guard permits an update. All else is
constant: a step in which something done before has a say, with a sample left out, or with a batch of a form
that was not seen before, is left to `train_step`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.compiled import ChangedError
from surefoot.graph import CHECK_EVERY, form
from surefoot.guard.arithmetic import Tensors
from surefoot.guard.detect import MOST_GROWTH, Decision, Limits, judge
from surefoot.keys import seed_of
from surefoot.measure.readings import pack
from surefoot.train_step import Attempt, Inside, Parts, train_step
from surefoot.types import Minibatch, leaves, map_leaves
from surefoot.unchanged import Unchanged

_MOST_FORMS = 8
"""Forms of batches that are captured: each has its own memory for what is between its kernels."""


class _Launch(NamedTuple):
    """A captured step. data: what it reads as its batch. draws: states of its random numbers, one for each
    logical micro-batch. attempt: what it leaves, its `numbers` packed. grads: of `attempt.trained`, if any
    are kept.
    """

    graph: torch.cuda.CUDAGraph
    data: list[Tensor]
    draws: list[torch.Generator]
    attempt: Attempt
    grads: list[Tensor | None]


class UncapturedError(Exception):
    """A step cannot be captured."""


class Captured:
    """Steps of one run, captured; see `surefoot.choice` for whether that is possible.

    suspects: the next step looks whether anything has changed that a graph took for constant; to be set
    after code of others has run.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, device = parts, parts.device
        self.suspects = self._has_grads = True
        self._unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
        self._arithmetic = Tensors(device)
        self._limits = torch.full((len(Limits._fields),), torch.inf, dtype=torch.float64, device=device)
        self._was_high = torch.zeros((), dtype=torch.bool, device=device)
        self._limits_of: Limits | None = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._generator = torch.cuda.default_generators[device.index or 0]
        self._launches: dict[tuple[Any, ...], _Launch] = {}
        self._launches_of: Any = None
        self._seen: list[Any] = []
        self._given_up: list[Any] = []

    def __call__(self, batch: Minibatch, multiplier: float, *, check: bool = False) -> Attempt | None:
        """Attempts one update; None if it is one for `train_step`: nothing was changed then.

        check: looks whether anything has changed that a graph took for constant, as is done now and then
        without it; a caller's code runs after the step, which finds gradients and generators as after an
        eager one.

        Raises:
            ChangedError: something has; nothing was changed by this step.
            UncapturedError: a step of this form cannot be captured; likewise.
        """
        step, parts = batch.slots.step, self._parts
        if check or self.suspects or (step + 1) % CHECK_EVERY == 0:
            if not self._unchanged() or parts.updater.is_hooked():
                raise ChangedError
            self.suspects = False
        data, launch = leaves(batch.data), None
        if step > 0 and batch.weights is None and parts.guard.is_usual(step):
            launch = self._launch_of(batch, data, multiplier, keeps_grads=check)
        if launch is None:
            self._has_grads = True
            return None
        self._drop_grads()
        self._take_over_limits()
        attempt = self._launched(launch, batch, data, multiplier)
        if parts.guard.on:
            parts.guard.judge.taken(attempt.loss, attempt.grad_norm, high=self._was_high)
        if check:
            for param, grad in zip(attempt.trained, launch.grads, strict=True):
                param.grad = grad
            parts.generators.seed(seed_of(parts.draws, step, attempt.num_micro - 1))
            self._generator.set_offset(launch.draws[-1].get_offset())
            attempt = attempt._replace(permitted=attempt.permitted.bool())
        return attempt

    def _drop_grads(self) -> None:
        """Those of an eager step, or of a capture: they are no later step's."""
        if self._has_grads:
            for p in self._parts.params:
                p.grad = None
            self._has_grads = False

    def try_out(self, batch: Minibatch) -> list[Attempt]:
        """Captures a step with a batch, at a rate of zero, and launches it twice. The same has been taken
        eagerly before.
        """
        launch = self._capture(batch, 0.0, keeps_grads=False)
        return [self._launched(launch, batch, leaves(batch.data), 0.0) for _ in range(2)]

    def _launch_of(
        self, batch: Minibatch, data: list[Any], multiplier: float, *, keeps_grads: bool
    ) -> _Launch | None:
        """The captured step for a batch; None for one of a form that has not been taken eagerly with this
        optimizer's state, so that all it needs is loaded, and made: what is made in a capture is made anew
        in each launch.
        """
        updater = self._parts.updater
        if updater.optimizer.state is not self._launches_of:  # loading a state replaces it
            self._launches.clear()
            self._seen.clear()
            self._pool = None  # it is no one's now, and torch takes no such pool again
            self._launches_of = updater.optimizer.state
        like = form(batch.data, data)
        if like not in self._seen:
            if len(self._seen) < _MOST_FORMS and all(isinstance(leaf, Tensor) for leaf in data):
                self._seen.append(like)
            return None
        key = (like, updater.measures(batch.slots.step))
        if key in self._given_up:
            return None
        if key not in self._launches:
            try:
                self._launches[key] = self._capture(batch, multiplier, keeps_grads=keeps_grads)
            except Exception as error:
                self._given_up.append(key)
                raise UncapturedError(f"{type(error).__name__}: {error}") from error
        return self._launches[key]

    def _capture(self, batch: Minibatch, multiplier: float, *, keeps_grads: bool) -> _Launch:
        parts = self._parts
        self._drop_grads()
        static = batch._replace(data=map_leaves(torch.clone, batch.data))
        parts.updater.write_rates(multiplier, parts.base_lr)
        own = self._generator.graphsafe_get_state()
        draws = [self._generator.clone_state() for _ in range(0, batch.num_rows, parts.micro)]
        graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        for state in draws:
            graph.register_generator_state(state)
        inside = Inside(self._decide, MOST_GROWTH, lambda micro: self._set_generator(draws[micro]))
        with torch.cuda.device(parts.device):
            stream = torch.cuda.current_stream()
            try:
                # Other threads may go on: one keeps checkpoints.
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    attempt = train_step(parts, static, multiplier, inside=inside)
                    attempt = attempt._replace(packed=pack(list(attempt.numbers())))
            except BaseException:
                # Torch leaves stream, pool and generator as they were within the capture.
                torch.cuda.set_stream(stream)
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                with suppress(Exception):
                    stream.wait_stream(self._stream)
                own = own.clone_state()
                raise
            else:
                # Before a capture torch writes seeds, on its stream, where a launch writes its own, on this
                # one: the first could come last (torch 2.11), even after that memory is another tensor's.
                stream.wait_stream(self._stream)
            finally:
                self._set_generator(own)
                self._has_grads = True
        self._pool = pool
        grads = [p.grad for p in attempt.trained] if keeps_grads else []
        return _Launch(graph, leaves(static.data), draws, attempt, grads)

    def _set_generator(self, state: torch.Generator) -> None:
        self._generator.graphsafe_set_state(state)

    def _decide(self, loss: Tensor, norm: Tensor) -> Decision:
        allowed = Limits(*self._limits.unbind())
        decision = judge(self._arithmetic, allowed, loss, norm, was_high=self._was_high)
        self._was_high.copy_(decision.high)
        return decision

    def _take_over_limits(self) -> None:
        """Writes what the judge allows to where a graph reads it, if that is not what it has written."""
        guard = self._parts.guard
        if not guard.on:
            return
        allowed, high = guard.judge.allowed, guard.judge.was_high
        if allowed is not self._limits_of:
            assert allowed is not None
            self._limits.copy_(torch.stack(allowed))
            self._limits_of = allowed
        if high is not self._was_high:
            if isinstance(high, Tensor):
                self._was_high.copy_(high)
            else:
                self._was_high.fill_(high)

    def _launched(
        self, launch: _Launch, batch: Minibatch, data: list[Tensor], multiplier: float
    ) -> Attempt:
        parts, left = self._parts, launch.attempt
        for micro, state in enumerate(launch.draws):
            state.manual_seed(seed_of(parts.draws, batch.slots.step, micro))
        for place, leaf in zip(launch.data, data, strict=True):
            place.copy_(leaf)
        parts.updater.write_rates(multiplier, parts.base_lr)
        launch.graph.replay()
        assert left.packed is not None
        packed = left.packed.clone()  # the next launch writes there
        loss, grad_norm, update_ratio, permitted, verdict, clip, *scale = packed.unbind()
        return Attempt(
            loss, grad_norm, update_ratio, permitted, verdict, clip, scale[0] if scale else None,
            left.num_micro, left.trained, left.norms, packed,
        )  # fmt: skip
