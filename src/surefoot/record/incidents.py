"""Incidents: events that a person should know of, in plain words.

The words are made from the event alone, so that a run that ended years ago is explained alike. Each kind
has a runbook in ``docs/runbooks``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surefoot.record.events import Event

RUNBOOKS = "docs/runbooks"


@dataclass(frozen=True)
class Incident:
    """title: what happened. cause, evidence, action: as far as the run could tell, what it saw and did.
    advice: to a person. lost_steps, lost_s: updates and seconds that it cost. runbook: its name.
    """

    kind: str
    title: str
    step: int
    time: float
    cause: str
    evidence: str
    action: str
    advice: str
    runbook: str
    lost_steps: int = 0
    lost_s: float = 0.0


DETECTORS = {
    "D0": ("weights or the optimizer's state are not finite", "rolled-back"),
    "D3": ("the loss left its best level for good", "rolled-back"),
    "D4": ("many updates had to be refused", "rolled-back"),
    "D5": ("updates in a row were not finite", "rolled-back"),
    "D6": ("the loss does not come down", "does-not-learn"),
    "D7": ("a continued run did not repeat what was", "does-not-reproduce"),
}
"""What each alarm of the guard says, and its runbook."""


def of_event(event: Event) -> Incident | None:
    """What an event means; None if nothing is to be told."""
    make = _KINDS.get(event["kind"])
    return make(event) if make else None


def _incident(event: Event, title: str, runbook: str, **words: Any) -> Incident:
    given = {"cause": "", "evidence": "", "action": "", "advice": "", **words}
    step, at = int(event.get("step", 0)), float(event["time"])
    return Incident(kind=event["kind"], title=title, step=step, time=at, runbook=runbook, **given)


def _refused(event: Event) -> Incident:
    would = event["kind"] == "would_skip"
    evidence = f"loss {float(event['loss']):.6g}, gradient norm {float(event['grad_norm']):.6g}"
    if "growth" in event:
        evidence += f", {float(event['growth']):.3g} times the running statistics"
    return _incident(
        event,
        "an update would have been refused" if would else "an update was refused",
        "refused-updates",
        cause=event["reason"],
        evidence=evidence,
        action="none: the guard only watches"
        if would
        else "weights, optimizer and buffers left as they were",
        advice=_what_to_do(event),
        lost_steps=0 if would else 1,
    )


def _what_to_do(event: Event) -> str:
    if "fp16" in event["reason"]:
        return "fp16 finds its loss scale this way; nothing is to be done while it is rare."
    units = event["reason"].startswith("statistics")
    otherwise = "bring all inputs to one scale" if units else "lower the rate or clip the gradient"
    return (
        f"Look at the samples of the step: surefoot replay RUN --step {event.get('step', 0)}. "
        f"If it recurs without bad samples, {otherwise}."
    )


def _quarantined(event: Event) -> Incident:
    ids, cause = event["ids"], event["reason"]
    if not event.get("at_once"):
        cause = f"an update was refused ({cause}), and would not have been without them"
    return _incident(
        event,
        f"{len(ids)} {'sample was' if len(ids) == 1 else 'samples were'} left out from here on",
        "left-out-samples",
        cause=cause,
        evidence="samples " + ", ".join(map(str, ids)),
        action="their places in later batches are holes of weight zero",
        advice="Look at these samples; mend or remove them before the next run.",
    )


def _released(event: Event) -> Incident:
    return _incident(
        event,
        f"let in again, after they were left out: {len(event['ids'])} samples",
        "left-out-samples",
        cause="a person decided so",
        evidence="samples " + ", ".join(map(str, event["ids"])),
        action="they take part from here on; one that breaks a step again is left out again",
    )


def _rolled_back(event: Event) -> Incident:
    told, runbook = DETECTORS.get(event["detector"], ("it went wrong", "rolled-back"))
    transient = "does not reproduce" in event["cause"]
    left = int(event.get("left", event["at"] + 1))
    tried = f" Tried besides: {'; '.join(event['tried'])}." if event.get("tried") else ""
    ledger = f", from ledger {event['ledger'][:12]}" if event["step"] and "ledger" in event else ""
    return _incident(
        event,
        f"the run went back from step {left - 1} to step {event['step']}: {told}",
        "does-not-reproduce" if transient else runbook,
        cause=event["cause"],
        evidence=f"{event['detector']}: {event['reason']}",
        action=f"back to the state after {event['step']} updates, a new segment{ledger}, and on with: "
        f"{event['remedy']}.{tried}",
        advice="Suspect the memory or the processor: test the machine before it trains again."
        if transient
        else "For the next run change the recipe so that this is not needed: see cause and remedy.",
        lost_steps=left - int(event["step"]),
        lost_s=float(event.get("seconds", 0.0)),
    )


def _borne(event: Event) -> Incident:
    spikes = event["detector"] == "statistics spike"
    return _incident(
        event,
        "running statistics were let grow"
        if spikes
        else "an alarm was borne: the data changed, not the weights",
        "changed-data",
        cause="what goes into a batch norm changed"
        if spikes
        else "batches that differ from what came before",
        evidence=f"{event['detector']}: {event['reason']}",
        action="they are taken as they come for a while" if spikes else "none; watched on",
        advice="Look at the data from that step on: order, labels, scale.",
    )


def _alarm(event: Event) -> Incident:
    told, runbook = DETECTORS.get(event["detector"], ("it goes wrong", "rolled-back"))
    return _incident(
        event,
        f"an alarm, and nothing done: {told}",
        runbook,
        evidence=f"{event['detector']}: {event['reason']}",
        action=_done_about(event),
        advice="Look at loss and gradient norm: surefoot report RUN.",
    )


def _done_about(event: Event) -> str:
    if "untried" in event:
        return f"none: {event['untried']}"
    if event.get("tried"):
        return "none: none of these helped, tried on the same batches: " + ", ".join(event["tried"])
    return "none: nothing that could be tried helps, or the guard only watches"  # of an earlier version


def _layer(event: Event) -> Incident:
    return _incident(
        event,
        f"the gradient of {event['layer']} {event['how']}",
        "layers",
        cause="the signal dies or grows on its way through the layers",
        evidence=event["reason"],
        action="none: it is only told",
        advice="Normalise, initialise for the activation, or add skip connections; look at the layers: "
        f"surefoot replay RUN --step {max(0, int(event.get('step', 1)) - 1)}.",
    )


def _diverged(event: Event) -> Incident:
    return _incident(
        event,
        "the run ended: it diverged",
        "diverged",
        cause=event["reason"],
        action="ended with exit code 3, its newest good state kept",
        advice=event.get("fix") or "Lower the learning rate, clip the gradient, or look at the data.",
    )


def _hang(event: Event) -> Incident:
    return _incident(
        event,
        f"nothing moved for {event['seconds']:g} s",
        "hang",
        evidence=f"stacks of all threads: {event['stacks']}",
        action="none: it goes on waiting",
        advice="Read the stacks: the main thread's innermost line says what is waited for.",
        lost_s=float(event["seconds"]),
    )


def _worker(event: Event) -> Incident:
    facts = {k: v for k, v in event.items() if k not in ("n", "time", "kind", "attempt", "step")}
    return _incident(
        event,
        "a process that reads data died or hung, and was replaced",
        "worker-replaced",
        evidence=", ".join(f"{k} {v}" for k, v in facts.items()),
        action="all of them started anew with the batch that was missing; no sample lost or repeated",
        advice="If it recurs look at memory (dmesg names what the kernel killed) and at the source's code.",
    )


def _not_kept(event: Event) -> Incident:
    return _incident(
        event,
        "a state could not be written",
        "checkpoint-failed",
        cause=event["error"],
        evidence=f"try {event['tries']}; the newest good state: {event['newest_good']}",
        action=f"training goes on; tried again after {event['retry_s']:g} s",
        advice="Make room, or mend the disk, before the machine is stopped.",
    )


def _stuck(event: Event) -> Incident:
    return _incident(
        event,
        "a checkpoint that need not stay could not be removed",
        "checkpoint-failed",
        cause=event["error"],
        evidence=f"checkpoint {event['name']}",
        action="training goes on; tried again after each later one",
        advice="Look who holds it, or remove it (it may be .trash-... by now), before the disk is full.",
    )


def _poisoned(event: Event) -> Incident:
    return _incident(
        event,
        "a state was not sound",
        "checkpoint-failed",
        cause="it holds numbers that are not finite",
        evidence=f"checkpoint {event['name']}",
        action="kept for a look, never restored",
        advice="See what the guard did about it next.",
    )


def _rejected(event: Event) -> Incident:
    poisoned, used = event.get("poisoned", False), event.get("used", "an earlier one")
    return _incident(
        event,
        f"a {'state that was not sound' if poisoned else 'damaged checkpoint'} was passed over",
        "checkpoint-failed" if poisoned else "damaged-files",
        cause=event["reason"],
        action=f"{used} was used" if used else "the run began anew, since it had kept no other",
        advice="Nothing: see why it was not sound."
        if poisoned
        else "Look after the disk: surefoot verify RUN names every damaged file.",
    )


def _mended(event: Event) -> Incident:
    return _incident(
        event,
        "a damaged file was mended",
        "damaged-files",
        cause=event["reason"],
        action="what could be saved was",
        advice="Look after the disk: surefoot verify RUN.",
    )


def _took_over(event: Event) -> Incident:
    return _incident(
        event,
        "the run was taken over from a process that had stopped",
        "crash",
        cause=f"process {event['owner']} did not move for a while",
        action="it can no longer write to the run",
        advice="Look why it stood still; end it.",
    )


def _failed(event: Event) -> Incident | None:
    if event.get("status") != "failed":
        return None
    return _incident(
        event,
        "the process ended with an error",
        "crash",
        cause=str(event.get("error", "unknown")),
        evidence=f"class of failure: {event.get('failure', 'unknown')}",
        action="the newest checkpoint is as it was",
        advice="Mend the cause and run the same command again.",
    )


def _uncompiled(event: Event) -> Incident:
    if "reason" in event:
        return _incident(
            event,
            "steps of one kind are not captured",
            "uncompiled",
            cause=str(event["reason"]),
            action="they are eager ones: slower",
            advice="If the GPU's memory is short, make batch.micro smaller.",
        )
    return _incident(
        event,
        "steps are not compiled any more",
        "uncompiled",
        cause="something that the compiled step took for constant was changed",
        action="each step from there on is an eager one: slower, and right",
        advice="Give what changes as a tensor, or train with --compile off.",
    )


_KINDS: dict[str, Callable[[Event], Incident | None]] = {
    "skipped": _refused,
    "would_skip": _refused,
    "quarantined": _quarantined,
    "released": _released,
    "rolled_back": _rolled_back,
    "borne": _borne,
    "alarm": _alarm,
    "layer": _layer,
    "diverged": _diverged,
    "hang": _hang,
    "worker_replaced": _worker,
    "checkpoint_failed": _not_kept,
    "checkpoint_poisoned": _poisoned,
    "checkpoint_stuck": _stuck,
    "checkpoint_rejected": _rejected,
    "mended": _mended,
    "took_over": _took_over,
    "uncompiled": _uncompiled,
    "ended": _failed,
}
KINDS = tuple(_KINDS)
