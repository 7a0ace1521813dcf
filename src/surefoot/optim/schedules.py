"""Schedules: the learning rate as a pure function of the update count.

A schedule is a chain of pieces; the rate of an update is the optimizer's ``lr`` times the value of
the piece the update falls in::

    warmup("5%") >> cosine(to=0.01)
    constant(over=700) >> constant(over=3) * 300.0 >> cosine(to=0.01)
    warmup(500) >> hold() >> linear(to=0.0, over="20%")

A piece lasts ``over`` (a duration); one piece of a chain may leave it out and lasts what the others
leave of the run. Conventions, the same in every piece: t counts *completed* updates of the piece, from
0 to n - 1 in a piece of n updates; a warm-up's value is (t + 1) / n, so it is never 0 and ends at 1; a
decay starts at its `start` in its first update and reaches `to` in its last; after the last piece its
last value holds. Updates are what is counted, however many micro-batches they have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, Self

from surefoot.errors import RecipeError
from surefoot.types import DurationLike, check_fields

Curve = Callable[[int], float]
Measure = Callable[[DurationLike, str], int]
"""A duration, and its name for messages, as a number of updates."""


@dataclass(frozen=True)
class Piece(ABC):
    """A piece of a schedule. ``a >> b`` joins, ``a * 3.0`` scales.

    Args:
        over: how long it lasts; None fills what the other pieces of the chain leave.
        scale: multiplies its values.
    """

    over: DurationLike | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self, _name(self))
        self.check()

    def check(self) -> None:  # noqa: B027 - most pieces take any number
        """Raises a `RecipeError` if a value is out of range."""

    @abstractmethod
    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Values at t = 0 .. n - 1, unscaled.

        Args:
            n: updates in this piece.
            measure: turns the piece's own durations into updates.
            start: updates before this piece.
            before: the last value of the piece before, 1 for the first.
        """

    def __rshift__(self, other: Piece | Chain) -> Chain:
        return Chain((self,)) >> other

    def __mul__(self, factor: float) -> Self:
        if not isinstance(factor, Real):
            raise RecipeError(f"schedule: {_name(self)} * {factor!r}: the factor must be a number.")
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Chain:
    """Pieces one after another."""

    pieces: tuple[Piece, ...]

    def __rshift__(self, other: Piece | Chain) -> Chain:
        if not isinstance(other, Piece | Chain):
            raise RecipeError(
                f"schedule: >> {other!r} is no schedule.", fix="Join pieces: warmup('5%') >> cosine()."
            )
        return Chain(self.pieces + (other.pieces if isinstance(other, Chain) else (other,)))

    def __mul__(self, factor: float) -> Chain:
        scaled = [
            piece if i and isinstance(piece, Hold) else piece * factor
            for i, piece in enumerate(self.pieces)  # a hold takes on the piece before, scaled already
        ]
        return Chain(tuple(scaled))

    __rmul__ = __mul__

    def resolve(self, total: int, measure: Measure) -> Resolved:
        """The schedule of a run of `total` updates.

        Raises:
            RecipeError: the pieces are longer than the run, or two leave out ``over``.
        """
        lengths = [
            None if p.over is None else measure(p.over, f"schedule: over of {_name(p)}")
            for p in self.pieces
        ]
        if lengths.count(None) > 1:
            raise RecipeError(
                f"schedule: {lengths.count(None)} pieces leave out over=.",
                why="Only one piece can fill the rest of the run.",
                fix="Say how long the others last.",
            )
        given = sum(n for n in lengths if n is not None)
        if given > total:
            raise RecipeError(
                f"schedule: its pieces last {given} updates, but the run has {total}.",
                fix="Shorten them, lengthen the run, or use shares of the run such as over='5%'.",
            )
        curves: list[tuple[int, int, Curve]] = []
        start, before, plateau = 0, 1.0, None
        for piece, length in zip(self.pieces, lengths, strict=True):
            n = total - given if length is None else length
            if n:
                curve = piece.curve(n, measure, start=start, before=before)
                curves.append((start, n, _scaled(curve, piece.scale)))
                before = curves[-1][2](n - 1)
                sampled = [curves[-1][2](t) for t in {0, n // 2, n - 1}]
                if not all(math.isfinite(value) and value >= 0 for value in sampled):
                    raise RecipeError(
                        f"schedule: {_name(piece)} takes the values {sampled}.",
                        why="A rate is finite and not negative.",
                    )
            if isinstance(piece, Plateau):
                if plateau is not None:
                    raise RecipeError("schedule: one plateau is enough.")
                plateau = (start, piece)
            start += n
        return Resolved(tuple(curves), total, plateau)


Schedule = Piece | Chain


def resolve(schedule: Schedule, total: int, measure: Measure) -> Resolved:
    """A schedule over a run of `total` updates; see `Chain.resolve`."""
    return (schedule if isinstance(schedule, Chain) else Chain((schedule,))).resolve(total, measure)


@dataclass(frozen=True)
class Resolved:
    """A schedule of a run of known length: call it with the number of completed updates."""

    curves: tuple[tuple[int, int, Curve], ...]
    total: int
    plateau: tuple[int, Plateau] | None

    def __call__(self, step: int, *, cuts: int = 0) -> float:
        """The multiplier in update `step` (from 0), after `cuts` reductions on plateau."""
        value = 1.0
        for start, n, curve in self.curves:
            if step < start:
                break
            value = curve(min(step - start, n - 1))
        if self.plateau is not None and step >= self.plateau[0]:
            value *= max(self.plateau[1].factor ** cuts, self.plateau[1].least)
        return value

    def table(self) -> list[float]:
        """All values, update by update."""
        return [self(step) for step in range(self.total)]


def _scaled(curve: Curve, scale: float) -> Curve:
    return curve if scale == 1.0 else lambda t: curve(t) * scale


def _name(piece: Piece) -> str:
    return type(piece).__name__.lower()


def _progress(t: int, n: int) -> float:
    """From 0 in the first update to 1 in the last."""
    return t / (n - 1) if n > 1 else 0.0


@dataclass(frozen=True)
class Constant(Piece):
    """1 throughout."""

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """1."""
        return lambda t: 1.0


@dataclass(frozen=True)
class Hold(Piece):
    """The last value of the piece before, scale included; 1 if it is the first."""

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """`before`."""
        return lambda t: before


@dataclass(frozen=True)
class Warmup(Piece):
    """Linear: (t + 1) / n, from 1/n up to 1 (Goyal et al. 2017)."""

    over: DurationLike | None = None

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """(t + 1) / n."""
        return lambda t: (t + 1) / n


@dataclass(frozen=True)
class Linear(Piece):
    """Linear from `start` to `to`."""

    to: float = 0.0
    start: float = 1.0

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Start + (to - start) p with p = t / (n - 1)."""
        return lambda t: self.start + (self.to - self.start) * _progress(t, n)


@dataclass(frozen=True)
class Cosine(Piece):
    """Half a cosine from 1 to `to` (Loshchilov & Hutter 2017, without restarts)."""

    to: float = 0.0

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """To + (1 - to) (1 + cos(pi p)) / 2 with p = t / (n - 1)."""
        return lambda t: self.to + (1 - self.to) * _half_cosine(_progress(t, n))


def _half_cosine(p: float) -> float:
    return (1 + math.cos(math.pi * p)) / 2


@dataclass(frozen=True)
class Step(Piece):
    """Multiplied by `factor` after each `every`."""

    every: DurationLike
    factor: float = 0.1

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Factor ** floor(t / every)."""
        every = max(1, measure(self.every, "schedule: every of step"))
        return lambda t: self.factor ** (t // every)


@dataclass(frozen=True)
class Exponential(Piece):
    """Geometric: by `gamma` per update, or from 1 to `to`; give one of them."""

    gamma: float | None = None
    to: float | None = None

    def check(self) -> None:
        """Ranges."""
        if (self.gamma is None) == (self.to is None):
            raise RecipeError("exponential needs either gamma (per update) or to (at the end).")
        if (self.gamma or self.to or 0.0) <= 0:
            raise RecipeError("exponential: gamma or to must be above zero.")

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Gamma ** t, or to ** p with p = t / (n - 1)."""
        gamma, to = self.gamma, self.to
        if gamma is not None:
            return lambda t: gamma**t
        assert to is not None
        return lambda t: to ** _progress(t, n)


@dataclass(frozen=True)
class InverseSqrt(Piece):
    """Falls with the square root of the update count (Vaswani et al. 2017).

    Args:
        timescale: a duration; left out, the length of the pieces before, so that
            ``warmup(w) >> inverse_sqrt()`` is sqrt(w / t) in update t of the run.
    """

    timescale: DurationLike | None = None

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """sqrt(s / (s + t)) for a timescale of s updates."""
        scale = start if self.timescale is None else measure(self.timescale, "schedule: timescale")
        scale = max(1, scale)
        return lambda t: math.sqrt(scale / (scale + t))


@dataclass(frozen=True)
class OneCycle(Piece):
    """Up to 1 and down again by half cosines (Smith & Topin 2019; torch's two-phase variant).

    Args:
        peak: share of the piece at which it is at 1, in (0, 1).
        start: first value. to: last value.
    """

    peak: float = 0.3
    start: float = 1 / 25
    to: float = 1 / 25e4

    def check(self) -> None:
        """Ranges."""
        if not 0 < self.peak < 1:
            raise RecipeError(f"one_cycle: peak = {self.peak} must lie between 0 and 1.")

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Rises for p < peak, falls after it, with p = t / (n - 1)."""

        def value(t: int) -> float:
            p = _progress(t, n)
            if p < self.peak:
                return 1 + (self.start - 1) * _half_cosine(p / self.peak)
            return self.to + (1 - self.to) * _half_cosine((p - self.peak) / (1 - self.peak))

        return value


@dataclass(frozen=True)
class Restarts(Piece):
    """Cosine with warm restarts (SGDR, Loshchilov & Hutter 2017).

    Args:
        period: length of the first cycle. growth: each cycle is that many times as long.
        to: last value of each cycle.
    """

    period: DurationLike
    growth: int = 1
    to: float = 0.0

    def check(self) -> None:
        """Ranges."""
        if self.growth < 1:
            raise RecipeError(f"restarts: growth = {self.growth} must be at least 1.")

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """Cosine of the position within the cycle that t falls in."""
        first = max(1, measure(self.period, "schedule: period of restarts"))

        def value(t: int) -> float:
            if self.growth == 1:
                length, at = first, t % first
            else:
                cycle = int(math.log(1 + t * (self.growth - 1) / first, self.growth) + 1e-9)
                begin = first * (self.growth**cycle - 1) // (self.growth - 1)
                length, at = first * self.growth**cycle, t - begin
            return self.to + (1 - self.to) * _half_cosine(_progress(at, length))

        return value


@dataclass(frozen=True)
class Plateau(Piece):
    """1 until a validation metric stops improving; each time it does, multiplied by `factor`.

    The number of reductions so far is state of the run, kept in its checkpoints.

    Args:
        metric: name of a validation metric; ``"loss"`` is always there.
        factor: of each reduction. patience: validations in a row without improvement that are borne
            before it (as in torch's ReduceLROnPlateau).
        mode: whether smaller (``"min"``) or larger (``"max"``) is better.
        min_delta: what counts as improvement. least: the product of all reductions stays above it.
    """

    metric: str = "loss"
    factor: float = 0.1
    patience: int = 10
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    least: float = 0.0

    def check(self) -> None:
        """Ranges."""
        if not 0 < self.factor < 1:
            raise RecipeError(f"plateau: factor = {self.factor} must lie between 0 and 1.")
        if self.patience < 0 or self.min_delta < 0:
            raise RecipeError(
                f"plateau: patience = {self.patience} and min_delta = {self.min_delta} "
                "must not be negative."
            )

    def curve(self, n: int, measure: Measure, *, start: int, before: float) -> Curve:
        """1; the reductions are applied on top of it."""
        return lambda t: 1.0


constant = Constant
hold = Hold
warmup = Warmup
linear = Linear
cosine = Cosine
step = Step
exponential = Exponential
inverse_sqrt = InverseSqrt
one_cycle = OneCycle
restarts = Restarts
plateau = Plateau
