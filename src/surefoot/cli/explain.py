"""``surefoot explain``."""

from __future__ import annotations

import textwrap
import time

from rich.console import Console

from surefoot.export.explain import Explanation, explain
from surefoot.record.incidents import RUNBOOKS, Incident
from surefoot.run import RunView

_MOST = 50


def explain_run(view: RunView) -> Explanation:
    """What its directory tells."""
    return explain(view.summary(), view.log(), view.log(all_rows=True), view.events(all_events=True))


def show(told: Explanation, out: Console) -> None:
    """Prints it."""

    def say(text: str, indent: int = 0, *, hanging: int = 0, style: str | None = None) -> None:
        first, later = " " * indent, " " * (indent + hanging)
        wrapped = textwrap.fill(
            text, out.width, initial_indent=first, subsequent_indent=later, break_long_words=False
        )
        out.print(wrapped, markup=False, soft_wrap=True, style=style)

    say(told.verdict, style="bold")
    if told.incidents:
        out.print(f"\nWhat happened ({len(told.incidents)})", style="bold")
    for number, (incident, _) in enumerate(
        told.incidents[-_MOST:], start=max(1, len(told.incidents) - _MOST + 1)
    ):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.time))
        say(f"{number}. step {incident.step:,}, {when}: {incident.title}", 1, hanging=3)
        for name, text in _facts(incident):
            say(f"{name:<9} {text}", 4, hanging=10)
    if told.remarks:
        out.print("\nHow it went", style="bold")
    for remark in told.remarks:
        say(f"- {remark.what}", 1, hanging=2)
        say(f"{'to do':<9} {remark.advice}", 4, hanging=10)
        say(f"{'runbook':<9} {RUNBOOKS}/{remark.runbook}.md", 4, hanging=10)
    if not told.incidents and not told.remarks:
        out.print("Nothing happened that needs a person.")


def _facts(incident: Incident) -> list[tuple[str, str]]:
    cost = f"{incident.lost_steps:,} updates" if incident.lost_steps else ""
    if incident.lost_s >= 0.05:
        cost += (", " if cost else "") + f"{incident.lost_s:.1f} s"
    told = [
        ("cause", incident.cause),
        ("evidence", incident.evidence),
        ("done", incident.action),
        ("cost", cost),
        ("to do", incident.advice),
        ("runbook", f"{RUNBOOKS}/{incident.runbook}.md"),
    ]
    return [(name, text) for name, text in told if text]
