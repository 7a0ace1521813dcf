"""Explain: what happened in a run, in plain words, from its log and events alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surefoot.record.columns import Columns
from surefoot.record.events import Event
from surefoot.record.incidents import Incident, of_event

_FEW = 50  # steps, below which nothing is said about how the loss went
_WINDOWS = 40
_GROUPED = {
    "skipped",
    "would_skip",
    "checkpoint_failed",
    "checkpoint_stuck",
    "worker_replaced",
    "layer",
    "hang",
}
_APART = 200  # steps between incidents of one kind that are told of as one
_MUCH_WAIT, _MUCH_CHECKPOINT, _MUCH_VALIDATION = 0.2, 0.05, 0.25
_STILL, _GAP = 0.01, 0.1
_LITTLE = 0.05  # of the first loss: what is so low may stay
_TINY_CHANGE, _LARGE_CHANGE = 1e-6, 0.03


@dataclass(frozen=True)
class Remark:
    """Something about a run as a whole that may be done better."""

    what: str
    advice: str
    runbook: str


@dataclass(frozen=True)
class Explanation:
    """verdict: how it stands. incidents: in the order in which they came, alike ones joined; `num` says how
    many. remarks: on how it went.
    """

    verdict: str
    incidents: list[tuple[Incident, int]]
    remarks: list[Remark]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "verdict": self.verdict,
            "incidents": [{**vars(incident), "num": num} for incident, num in self.incidents],
            "remarks": [vars(remark) for remark in self.remarks],
        }


def explain(
    summary: Mapping[str, Any], log: Columns, all_rows: Columns, events: Sequence[Event]
) -> Explanation:
    """Explains a run.

    Args:
        summary: what ``show --json`` prints.
        log: one row per step. all_rows: also rows of steps that were repeated.
        events: all of them, in order.
    """
    found = [one for event in events if (one := of_event(event)) is not None]
    found += _crashes(events, all_rows, running=summary["status"] == "running")
    found.sort(key=lambda one: one.time)
    remarks = [*_on_time(log, all_rows, events), *_on_the_loss(log), *_on_validation(log, events)]
    return Explanation(_verdict(summary, log), _joined(found), remarks)


def _verdict(summary: Mapping[str, Any], log: Columns) -> str:
    said = {
        "finished": "finished",
        "stopped_early": "stopped early, since the validation metric did not improve any more",
        "diverged": "diverged",
        "preempted": "was interrupted, and goes on with the same command",
        "budget": "stopped at its budget, and goes on with the same command once that is raised",
        "running": "is running",
        "failed": "failed, or died without a word; the same command continues it",
    }[summary["status"]]
    done = f"{summary['step']:,} of {summary['total_steps']:,} updates (epoch {summary['epoch']:g})"
    text = f"The run {said}: {done}, {summary['train_s']:.1f} s of training"
    if summary["attempts"] > 1:
        text += f" in {summary['attempts']} attempts"
    metrics = [f"{name} {value:.5g}" for name, value in summary["metrics"].items()]
    text += "; " + ", ".join(metrics) if metrics else ""
    if summary["status"] == "diverged" and summary["reason"]:
        text += f". Why: {summary['reason']}"
    return text.removesuffix(".") + "."


def _crashes(events: Sequence[Event], rows: Columns, *, running: bool) -> list[Incident]:
    """Attempts that ended without a word: killed, or the machine went down."""
    found = []
    begun: Event | None = None
    for event in [*events, None]:
        begins = event is None or event["kind"] in ("started", "resumed")
        if not begins:
            if event is not None and event["kind"] == "ended":
                begun = None
            continue
        if begun is not None and not (event is None and running):
            found.append(_crash(begun, event, rows))
        begun = event
    return found


def _crash(begun: Event, resumed: Event | None, rows: Columns) -> Incident:
    mine = rows["attempt"] == begun["attempt"]
    last = int(rows["step"][mine].max()) + 1 if mine.any() else int(begun.get("step", 0))
    at = float(rows["time_s"][mine].max()) if mine.any() else float(begun["time"])
    lost_steps, lost_s, action = 0, 0.0, "not continued yet: run the same command again"
    if resumed is not None:
        again = mine & (rows["step"] >= resumed["step"])
        lost_steps, lost_s = int(again.sum()), float(rows["wall_s"][again].sum())
        lost_s += max(0.0, float(resumed["time"]) - at)
        action = f"continued as attempt {resumed['attempt']} from step {resumed['step']:,}"
    return Incident(
        kind="crash",
        title=f"attempt {begun['attempt']} ended without a word after step {last:,}",
        step=last,
        time=at,
        cause="killed (kill -9, out of memory), or the machine went down",
        evidence="no event says that it ended",
        action=action,
        advice="Look at dmesg and the scheduler's log for who killed it; surefoot supervise restarts it.",
        runbook="crash",
        lost_steps=lost_steps,
        lost_s=lost_s,
    )


def _joined(found: Sequence[Incident]) -> list[tuple[Incident, int]]:
    """Alike ones that follow each other closely, told of as one."""
    joined: list[tuple[Incident, int, int]] = []
    for one in found:
        for place, (first, num, last) in enumerate(joined):
            alike = first.kind == one.kind in _GROUPED and (first.cause, first.runbook) == (
                one.cause,
                one.runbook,
            )
            if alike and abs(one.step - last) <= _APART:
                steps, seconds = first.lost_steps + one.lost_steps, first.lost_s + one.lost_s
                joined[place] = replace(first, lost_steps=steps, lost_s=seconds), num + 1, one.step
                break
        else:
            joined.append((one, 1, one.step))
    return [(replace(one, title=_plural(one, num, last)), num) for one, num, last in joined]


def _plural(one: Incident, num: int, last: int) -> str:
    return one.title if num == 1 else f"{num} times until step {last:,}: {one.title}"


def _on_time(log: Columns, rows: Columns, events: Sequence[Event]) -> list[Remark]:
    """Where the time went."""
    wall = float(rows["wall_s"].sum())
    if len(log["step"]) < _FEW or wall <= 0:
        return []
    remarks = []
    waited = float(log["data_wait_s"].sum() / max(log["step_s"].sum(), 1e-9))
    if waited > _MUCH_WAIT:
        remarks.append(
            Remark(
                f"The loop waited for data in {100 * waited:.0f} % of its time.",
                "Give the source more processes (--workers), or arrays that lie in memory.",
                "data-wait",
            )
        )
    stalls = sum(float(e.get("stall_s", 0)) for e in events) / wall
    if stalls > _MUCH_CHECKPOINT:
        remarks.append(
            Remark(
                f"Checkpoints stopped the loop for {100 * stalls:.0f} % of its time.",
                "Keep states less often (checkpoint.every), or leave it at auto.",
                "checkpoint-cost",
            )
        )
    seconds = sum(float(e["seconds"]) for e in events if e["kind"] == "validated") / wall
    if seconds > _MUCH_VALIDATION:
        remarks.append(
            Remark(
                f"Validation took {100 * seconds:.0f} % of the time.",
                "Validate less often (validation.every), on fewer samples or in larger batches.",
                "validation-cost",
            )
        )
    return remarks


def _medians(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of about `_WINDOWS` stretches of equal length; what is not finite does not count."""
    parts = np.array_split(values, min(_WINDOWS, max(2, len(values) // 10)))
    return np.array([np.median(p[np.isfinite(p)]) if np.isfinite(p).any() else np.nan for p in parts])


def _on_the_loss(log: Columns) -> list[Remark]:
    """Whether and how the training loss came down."""
    if len(log["step"]) < _FEW:
        return []
    losses, rates = _medians(log["loss"]), _medians(log["lr"])
    remarks = []
    finite = losses[np.isfinite(losses)]
    if len(finite) < 4:
        return []
    drop = finite[0] - finite.min()
    best = np.minimum.accumulate(np.where(np.isfinite(losses), losses, np.inf))
    late_losses = losses[len(losses) // 2 :]
    chance = 3 * float(np.nanmedian(np.abs(late_losses - np.nanmedian(late_losses))))
    least = max(_STILL * max(drop, 0), min(chance, 0.1 * max(drop, 0)))
    since = int(np.argmax(best <= best[-1] + least))  # nothing worth speaking of gained after this window
    still = 1 - (since + 1) / len(losses)
    late = rates[since:] > 0.1 * rates.max()
    if drop <= _STILL * abs(finite[0]):
        remarks.append(
            Remark(
                f"The training loss never came down: {finite[0]:.4g} at first, {finite.min():.4g} at best.",
                "Try other rates (a tenth, ten times), look at the targets, overfit a single batch first.",
                "does-not-learn",
            )
        )
    elif still > 0.4 and late.mean() > 0.5 and best[-1] > _LITTLE * abs(finite[0]):
        step = int(len(log["step"]) * (since + 1) / len(losses))
        remarks.append(
            Remark(
                f"The training loss has stood at {best[-1]:.4g} since about step {step:,}, "
                f"{100 * still:.0f} % of the run, with the rate still high.",
                "Let the rate fall earlier (a schedule, or plateau), or stop earlier.",
                "plateau",
            )
        )
    else:
        fifth = max(2, len(losses) // 5)
        gained = best[-fifth - 1] - best[-1]
        if gained > 0.1 * drop and len(losses) >= 10:
            remarks.append(
                Remark(
                    f"The training loss was still falling at the end: {100 * gained / drop:.0f} % of all "
                    "that it came down, in the last fifth.",
                    "Train longer, or with a higher rate at first.",
                    "slow-convergence",
                )
            )
    ratios = log["update_ratio"][log["permitted"] > 0]
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) >= _FEW:
        usual = float(np.median(ratios[: max(_FEW, len(ratios) // 2)]))
        if not _TINY_CHANGE <= usual <= _LARGE_CHANGE:
            low = usual < _TINY_CHANGE
            much, other = ("little", "higher") if low else ("much", "lower")
            remarks.append(
                Remark(
                    f"An update changes the weights by {usual:.1g} of their length: very {much}.",
                    f"Try a {other} learning rate; about 1e-3 is usual.",
                    "slow-convergence" if low else "rolled-back",
                )
            )
    return remarks


def _on_validation(log: Columns, events: Sequence[Event]) -> list[Remark]:
    """Whether the validation loss turned while the training loss went on falling, or never followed it."""
    told = [e for e in events if e["kind"] == "validated" and "loss" in e["metrics"]]
    by_step = {int(e["step"]): float(e["metrics"]["loss"]) for e in told}
    steps, losses = np.array(sorted(by_step)), np.array([by_step[s] for s in sorted(by_step)])
    if len(steps) < 4 or len(log["step"]) < _FEW:
        return []
    finite = np.isfinite(losses)
    best = int(np.where(finite, losses, np.inf).argmin())
    remarks = []
    trained = log["loss"][np.isfinite(log["loss"]) & (log["permitted"] > 0)]
    if not len(trained):
        return []
    first, now = float(trained[0]), float(trained[-max(_FEW, len(trained) // 10) :].mean())
    if first > 0 and now < 0.5 * first and not losses[best] <= 0.75 * first:
        never = f"never below {losses[best]:.4g}" if finite.any() else "never finite"
        remarks.append(
            Remark(
                f"The training loss fell from {first:.4g} to {now:.4g}, and the validation loss was "
                f"{never}: what is learned does not hold for the validation data.",
                "Are both prepared alike? With batch norm, a few training samples far out of range ruin "
                "its running statistics, though the training loss looks well. Else there are too few data.",
                "validation-apart",
            )
        )
    if not finite.all():
        return remarks
    rise, drop = losses[-1] - losses[best], losses[0] - losses[best]
    if best < len(losses) - 1 and rise > _GAP * max(drop, abs(losses[best])):
        remarks.append(
            Remark(
                f"The validation loss was best after step {steps[best]:,} ({losses[best]:.4g}) and rose to "
                f"{losses[-1]:.4g} since: the model learns its training data by heart.",
                "Stop there (early_stopping), or regularise: weight decay, dropout, augmentation, more "
                "data. checkpoint.keep_best keeps the best state.",
                "overfitting",
            )
        )
    return remarks
