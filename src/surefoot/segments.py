"""Where a run went back, as its state tells: from what the ledger keeps, and from what the guard did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surefoot.guard.history import History
from surefoot.record.ledger import Branch


def branches_of(facts: Mapping[str, Any]) -> list[Branch]:
    """Where the run of a state (its JSON part) went back. Versions before did not keep that: then it is
    what the guard did, without ledgers.
    """
    kept = facts.get("branches")
    if kept is not None:
        return [Branch(*branch) for branch in kept]
    return [
        Branch(i.at + 1, i.begins, None) for i in History.of(facts).interventions if i.kind == "rollback"
    ]


def begins_of_segments(facts: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Where segments begin that lie on the way to a state: what to call it, updates, ledger."""
    branches = branches_of(facts)
    return [
        (f"the ledger where segment {number + 1} begins, after {begins} updates,", begins, ledger)
        for number, (_, begins, ledger) in enumerate(branches, start=1)
        if ledger is not None and all(later.begins >= begins for later in branches[number:])
    ]


def disagree(facts: Mapping[str, Any]) -> bool:
    """Whether the branches that a state keeps are not those of what the guard did: one per rollback, in
    order, and perhaps one per release.
    """
    interventions, rest = History.of(facts).interventions, branches_of(facts)
    place = 0
    for one in interventions:
        if one.kind == "rollback":
            alike = (
                n
                for n, branch in enumerate(rest[place:], start=place)
                if branch.begins == one.begins <= branch.left <= one.at + 1
            )
            place = next(alike, -1)
            if place < 0:
                return True
            del rest[place]
    released = [one.begins for one in interventions if one.kind == "release"]
    return any(branch.begins not in released for branch in rest) or len(rest) > len(released)
