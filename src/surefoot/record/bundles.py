"""Bundles: what an incident leaves in ``incidents/`` for whoever looks into it, secrets redacted."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.record.columns import Columns
from surefoot.record.events import Event
from surefoot.record.incidents import RUNBOOKS, Incident, of_event

LEAVE_A_BUNDLE = ("rolled_back", "diverged", "hang")
FAILURES_THAT_DO = ("unknown", "out_of_memory", "state")
"""Classes of failure with which a run ends that do: with others the disk may hang, or the user knows."""
_ROWS = 2000
_TIMELINE = 40


def leave_bundle(
    folder: Path, event: Event, *, identity: Mapping[str, Any], events: Sequence[Event], log: Columns
) -> Path:
    """Writes what helps to understand an incident into a folder of its own, and a draft of a post-mortem.

    Args:
        folder: ``incidents/`` of the run.
        events, log: of the run, up to now.

    Raises:
        OSError: the disk does not take it.
    """
    path = folder / f"{event['n']:05d}-{event['kind']}"
    path.mkdir(parents=True, exist_ok=True)
    incident = of_event(event)
    assert incident is not None
    step = int(event.get("at") or event.get("step") or 0)
    run = folder.parent
    about = {
        "run": identity["id"],
        "event": redacted("", event),
        "incident": redacted("", vars(incident)),
        "replay": f"surefoot replay {run} --step {max(0, step - 1)}",
        "recipe": {"origin": redacted("", identity.get("origin", {})), "commit": identity.get("commit")},
        "command": _redacted_command(identity.get("command", [])),
        "environment": identity.get("environment", {}),
        "variables": variables(os.environ),
        "checkpoints": sorted(p.name for p in (run / "checkpoints").glob("[0-9]*")),
    }
    (path / "incident.json").write_text(json.dumps(about, indent=1, default=str) + "\n")
    with (path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(log)
        writer.writerows(zip(*(values[-_ROWS:].tolist() for values in log.values()), strict=True))
    (path / "POSTMORTEM.md").write_text(_post_mortem(incident, about, events))
    return path


_SECRET = re.compile(r"key|token|secret|passw|pwd|credential|auth|cookie|session|private|salt|dsn", re.I)
_REDACTED = (
    (re.compile(r"(\w+://)[^\s@]+@"), r"\1(redacted)@"),
    (
        re.compile(r"([?&;][\w-]*(?:token|sig|key|secret|pass|auth|credential)[\w-]*=)[^&\s\"']+", re.I),
        r"\1(redacted)",
    ),
    (re.compile(r"((?:passw\w*|token|secret|api_?key)\s*[=:]\s*)[^\s,;&\"']+", re.I), r"\1(redacted)"),
    (re.compile(r"\b[\w.+-]+:[^\s:@/]+@(?=[\w.-]+)"), "(redacted)@"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abp]-|AKIA|eyJ)[\w.-]{6,}"), "(redacted)"),
)
"""Addresses, their parameters, assignments and well-known kinds of tokens within a text."""
_TOLD = re.compile(
    r"SUREFOOT_|OMP_|MKL_|OPENBLAS_|KMP_|CUDA_|CUBLAS_|NCCL_|NVIDIA_|TORCH|PYTORCH|PYTHON|SLURM_|HOSTNAME$"
    r"|LANG$|LC_|TZ$|MALLOC_|LD_PRELOAD$|RANK$|WORLD_SIZE$|LOCAL_RANK$"
)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a bundle: of those that may bear on training their values, of others the
    names. What looks like a secret by its name is redacted, and names and passwords in addresses.
    """
    return {
        name: str(redacted(name, value)) if _TOLD.match(name) else "(left out)"
        for name, value in sorted(environment.items())
    }


def redacted(name: str, value: Any) -> Any:
    """A value without what looks like a secret: by its name, or as a password in an address."""
    if _SECRET.search(name):
        return "(redacted)"
    if isinstance(value, Mapping):
        return {key: redacted(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted("", part) for part in value]
    return _redacted_text(value) if isinstance(value, str) else value


def _redacted_text(text: str) -> str:
    for pattern, instead in _REDACTED:
        text = pattern.sub(instead, text)
    return text


def _redacted_command(words: Sequence[str]) -> list[str]:
    """A command line; a secret may follow its name after ``=`` or a space."""
    told: list[str] = []
    secret = False
    for word in words:
        key, equals, _ = word.partition("=")
        named = bool(_SECRET.search(key))
        if secret:
            told.append("(redacted)")
        else:
            told.append(f"{key}=(redacted)" if named and equals else _redacted_text(word))
        secret = named and not equals and word.startswith("--")
    return told


def _clock(event: Event) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(float(event["time"])))


def _why(event: Event) -> str:
    return str(event.get("reason", event.get("status", ""))).replace("|", "/")


def _post_mortem(incident: Incident, about: Mapping[str, Any], events: Sequence[Event]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(incident.time))
    timeline = "\n".join(
        f"| {_clock(e)} | {e.get('step', '')} | {e['kind']} | {_why(e)} |" for e in events[-_TIMELINE:]
    )
    text = f"""# Post-mortem (draft): {incident.title}

Run {about["run"]}, step {incident.step:,}, {when}. Runbook: {RUNBOOKS}/{incident.runbook}.md

## What happened

{incident.title}.

* Cause, as far as the run could tell: {incident.cause or "not known"}
* Evidence: {incident.evidence or "see rows.csv and incident.json"}
* What surefoot did: {incident.action or "nothing"}

## What it cost

{incident.lost_steps:,} updates, {incident.lost_s:.1f} s. *People and deadlines: to be filled in.*

## Timeline (UTC)

| time | step | event | |
|---|---|---|---|
{timeline}

## To look at

* `{about["replay"]}`
* `rows.csv`: the newest rows of the step log; `incident.json`: environment, command, checkpoints.

## Why it could happen

*To be filled in.*

## What will be done so that it does not happen again

* {incident.advice or "*To be filled in.*"}
"""
    return _redacted_text(text)
