"""Tables on the terminal, and JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLORS = {
    "finished": "green",
    "stopped_early": "green",
    "running": "cyan",
    "preempted": "yellow",
    "budget": "yellow",
}
_SEGMENTS = 8  # of a lineage, the newest


def print_json(value: Any) -> None:
    """Prints JSON; numbers that are not finite become null, as JSON has none."""
    sys.stdout.write(json.dumps(strict(value), indent=2) + "\n")


def strict(value: Any) -> Any:
    """As JSON has it: no numbers that are not finite."""
    if isinstance(value, dict):
        return {name: strict(part) for name, part in value.items()}
    if isinstance(value, list):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(summary: Mapping[str, Any], identity: Mapping[str, Any]) -> RenderableType:
    """A run, as ``surefoot show`` prints it."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    status = Text(summary["status"], style=_COLORS.get(summary["status"], "red"))
    if summary["reason"]:
        status += Text(f" ({summary['reason']})", style="default")
    table.add_row("status", status)
    table.add_row("step", f"{summary['step']:,} of {summary['total_steps']:,}")
    table.add_row("epoch", str(summary["epoch"]))
    table.add_row("samples", f"{summary['samples']:,}")
    for name, value in summary["metrics"].items():
        table.add_row(name if name == "train_loss" else f"val {name}", f"{value:.6g}")
    table.add_row("interventions", str(summary["interventions"]))
    if summary["quarantined"]:
        left_out = summary["quarantined"]
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        table.add_row("samples left out", ", ".join(map(str, left_out[:10])) + more)
    table.add_row("attempts", str(summary["attempts"]))
    table.add_row("training time", f"{summary['train_s']:.1f} s")
    if summary["cost"]:
        per_step, per_epoch = summary["cost_per_step"], summary["cost_per_epoch"]
        table.add_row("cost", f"{summary['cost']:.4g} ({per_step:.3g} per step, {per_epoch:.3g} per epoch)")
    kept = summary["checkpoint_step"]
    table.add_row("checkpoint", "none yet" if kept is None else f"at step {kept:,}")
    table.add_row("digest", summary["digest"] or "-")
    table.add_row("ledger", summary["ledger"] or "-")
    for number, line in enumerate(_lineage(summary)):
        table.add_row("" if number else "lineage", line)
    options = identity.get("origin", {}).get("options", {})
    if options:
        table.add_row("options", " ".join(f"{k}={v}" for k, v in options.items()))
    environment = identity["environment"]
    keys = ("device", "threads", "torch", "python")
    facts = [f"{k} {environment[k]}" for k in keys]
    if environment.get("compiled"):
        facts.append(f"compiled {environment['compiled']}")
    table.add_row("environment", ", ".join(facts))
    return Group(Text(summary["run"], style="bold"), table)


def _lineage(summary: Mapping[str, Any]) -> list[str]:
    """A line for each segment, if there are several. Steps are counted from 0."""
    lineage = summary["lineage"] or []
    before = len(lineage) - _SEGMENTS
    told = [f"1 to {before}: see --json"] if before > 0 else []
    for number, segment in enumerate(lineage, start=1):
        begins, ends, kept = segment["begins"], segment["ends"], segment["kept"]
        if ends is not None:
            given_up = "given up" if kept == begins else f"given up from step {kept:,} on"
            text = f"steps {begins:,} to {ends - 1:,}, {given_up}"
        elif summary["status"] == "diverged" and summary["checkpoint_step"] == begins:
            text = f"the state after {begins:,} updates, where the run ended"
        else:
            text = f"from step {begins:,} on"
        ledger = f"; ledger there {segment['ledger'][:12]}" if begins and segment["ledger"] else ""
        told += [f"{number}: {text}{ledger}"] if number > before else []
    return told if len(lineage) > 1 else []


def runs(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side, as ``surefoot runs`` prints them."""
    names = list(dict.fromkeys(n for s in summaries for n in s["metrics"]))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("run", "status", "step", "epoch", *names, "interventions", "time s", "digest"):
        right = column not in ("run", "status", "digest")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "run")
    for s in summaries:
        metrics = [s["metrics"].get(n) for n in names]
        table.add_row(
            s["run"],
            Text(s["status"], style=_COLORS.get(s["status"], "red")),
            f"{s['step']:,}",
            f"{s['epoch']:g}",
            *("-" if m is None else f"{m:.5g}" for m in metrics),
            str(s["interventions"]),
            f"{s['train_s']:.1f}",
            (s["digest"] or "-")[:10],
        )
    return table


def groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Parameter groups, as ``surefoot train`` prints them."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "group" else "right")
    for row in rows:
        table.add_row(
            row["group"],
            f"{row['tensors']:,}",
            f"{row['parameters']:,}",
            f"{row['lr']:g}",
            f"{row['weight_decay']:g}",
        )
    return table


def options(options: Sequence[Any]) -> Table:
    """Options of a recipe."""
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    for option in options:
        table.add_row(option.name, option.kind, str(option.default), option.help)
    return table


def operations(fields: Mapping[str, Any]) -> Table:
    """All keys of operations with their defaults."""
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    for key, field in fields.items():
        default = "" if field.default is None else str(field.default)
        table.add_row(key, default, field.description or "")
    return table
