"""One self-contained HTML page about one run or several: opens offline, can be sent by mail."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from surefoot.record.columns import Columns
from surefoot.record.events import Event

_BUCKETS = 1500
_CONFIG = {"displaylogo": False, "responsive": True}
_LEGEND = {"x": 1, "xanchor": "right", "y": 0.5, "yanchor": "middle", "bgcolor": "rgba(255,255,255,0.75)"}
_PALETTE = ("#3366cc", "#dc6018", "#109618", "#990099", "#0099c6", "#dd4477", "#808000", "#555555")


@dataclass(frozen=True)
class Subject:
    """A run, as a report sees it: its summary, identity, log and events."""

    name: str
    summary: dict[str, Any]
    identity: dict[str, Any]
    log: Columns
    events: Sequence[Event]


def render(subjects: Sequence[Subject]) -> str:
    """The page."""
    title = "surefoot · " + ", ".join(s.name for s in subjects)
    figures = [
        _by_step(subjects, "loss", "Training loss", "loss", log_y=_spans_decades(subjects, "loss")),
        _validation(subjects),
        _by_step(subjects, "lr", "Learning rate", "learning rate"),
        _by_step(subjects, "grad_norm", "Gradient norm, before clipping", "2-norm", log_y=True),
        _by_step(subjects, "update_ratio", "Update ratio", "‖change‖ / ‖weights‖", log_y=True),
        _timing(subjects),
    ]
    plots = "".join(
        f'<figure id="plot-{i}">'
        + figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
        + "</figure>"
        for i, figure in enumerate(figures)
        if figure.data
    )
    return _PAGE.format(
        title=html.escape(title),
        script=get_plotlyjs(),
        summary=_summary(subjects),
        plots=plots,
        details="".join(_details(s) for s in subjects),
    )


# ---------------------------------------------------------------------------------- plots


def thin(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most 2 x 1,500 points: the least and the greatest of each stretch, so that no spike is lost."""
    if len(x) <= 2 * _BUCKETS:
        return x, y
    keep = []
    for part in np.array_split(np.arange(len(y)), _BUCKETS):
        values = y[part]
        if np.isfinite(values).any():
            keep += sorted({part[np.nanargmin(values)], part[np.nanargmax(values)]})
    return x[keep], y[keep]


def _line(
    x: NDArray[Any], y: NDArray[Any], name: str, color: str, *, legend: bool, dash: str = "solid"
) -> go.Scatter:
    measured = ~np.isnan(y)
    x, y = thin(x[measured], y[measured])
    mode = "lines" if len(x) > 1 else "markers"
    return go.Scatter(
        x=x.tolist(), y=y.tolist(), name=name, mode=mode, showlegend=legend,
        line={"color": color, "width": 1.4, "dash": dash},
    )  # fmt: skip


def _figure(title: str, y_title: str, *, log_y: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0.01, "font": {"size": 15}},
        template="plotly_white",
        height=300,
        margin={"l": 60, "r": 16, "t": 40, "b": 40},
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": y_title}, "type": "log" if log_y else "linear"},
        legend=_LEGEND,
    )
    return figure


def _by_step(
    subjects: Sequence[Subject], column: str, title: str, y_title: str, *, log_y: bool = False
) -> go.Figure:
    figure = _figure(title, y_title, log_y=log_y)
    for i, s in enumerate(subjects):
        y = s.log[column].astype(float)
        if not len(y) or np.isnan(y).all():
            continue
        color = _PALETTE[i % len(_PALETTE)]
        figure.add_trace(_line(s.log["step"], y, s.name, color, legend=len(subjects) > 1))
        refused = s.log["step"][~s.log["permitted"]]
        for step in refused[:200].tolist() if column in ("loss", "grad_norm") else ():
            figure.add_vline(x=step, line={"color": "#cc0000", "width": 1, "dash": "dot"})
    return figure


def _spans_decades(subjects: Sequence[Subject], column: str) -> bool:
    values = np.concatenate([s.log[column].astype(float) for s in subjects])
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 50 * np.median(values))


def _validation(subjects: Sequence[Subject]) -> go.Figure:
    figure = _figure("Validation", "metric")
    dashes = ("solid", "dash", "dot", "dashdot")
    for i, s in enumerate(subjects):
        validated = [e for e in s.events if e["kind"] == "validated"]
        names = list(dict.fromkeys(name for e in validated for name in e["metrics"]))
        for j, name in enumerate(names):
            points = [(e["step"], float(e["metrics"][name])) for e in validated if name in e["metrics"]]
            x, y = (np.array(values, float) for values in zip(*points, strict=True))
            label = name if len(subjects) == 1 else f"{s.name}: {name}"
            color = _PALETTE[(i if len(subjects) > 1 else j) % len(_PALETTE)]
            trace = _line(x, y, label, color, legend=True, dash=dashes[j % 4])
            figure.add_trace(trace)
    return figure


def _timing(subjects: Sequence[Subject]) -> go.Figure:
    figure = _figure("Time per step", "milliseconds", log_y=True)
    for i, s in enumerate(subjects):
        if not len(s.log["step"]):
            continue
        color, prefix = _PALETTE[i % len(_PALETTE)], "" if len(subjects) == 1 else f"{s.name}: "
        for column, label, dash in (
            ("step_s", "step", "solid"),
            ("data_wait_s", "of it data", "dot"),
        ):
            y = 1e3 * s.log[column].astype(float)
            figure.add_trace(_line(s.log["step"], y, prefix + label, color, legend=True, dash=dash))
    return figure


# ---------------------------------------------------------------------------------- tables


def _summary(subjects: Sequence[Subject]) -> str:
    keys = ["status", "step", "epoch", "samples", "interventions", "attempts", "train_s"]
    metrics = list(dict.fromkeys(m for s in subjects for m in s.summary["metrics"]))
    head = ["run", *keys, *metrics, "digest"]
    rows = [
        [s.name]
        + [_text(s.summary[k]) for k in keys]
        + [_text(s.summary["metrics"].get(m)) for m in metrics]
        + [(s.summary["digest"] or "–")[:12]]
        for s in subjects
    ]
    return _table(head, rows)


def _details(s: Subject) -> str:
    shown = [e for e in s.events if e["kind"] not in ("validated", "checkpointed")]
    told = ("n", "time", "kind", "attempt", "step", "environment")
    rows = [
        [
            str(np.datetime64(int(e["time"]), "s")).replace("T", " "),
            e["kind"],
            _text(e.get("step")),
            ", ".join(f"{k}: {_text(v)}" for k, v in e.items() if k not in told and v),
        ]
        for e in shown[:500]
    ]
    groups = [[_text(v) for v in g.values()] for g in s.identity["groups"]]
    recipe = json.dumps(s.identity["recipe"], indent=1)
    environment = json.dumps(s.identity["environment"], indent=1)
    return (
        f"<section><h2>{html.escape(s.name)}</h2>"
        f"<h3>Events</h3>{_table(['time (UTC)', 'what', 'step', 'facts'], rows)}"
        f"<h3>Parameter groups</h3>{_table(list(s.identity['groups'][0]), groups)}"
        f"<details><summary>Recipe</summary><pre>{html.escape(recipe)}</pre></details>"
        f"<details><summary>Environment</summary><pre>{html.escape(environment)}</pre></details>"
        "</section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(head, "th")}{body}</table></div>'


def _text(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.5g}"
    return str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
 body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 12px 20px;
        color: #1c2530; background: #fff; }}
 h1 {{ font-size: 21px; }} h2 {{ font-size: 18px; margin-top: 28px; }} h3 {{ font-size: 15px; }}
 .scroll {{ overflow-x: auto; }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
 th, td {{ padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #e3e7ec;
          vertical-align: top; }}
 th {{ font-weight: 600; color: #52606d; white-space: nowrap; }}
 .plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%), 1fr));
          gap: 8px; margin-top: 16px; }}
 figure {{ margin: 0; min-width: 0; }}
 pre {{ background: #f6f8fa; padding: 10px; overflow-x: auto; font-size: 13px; }}
 @media print {{ .plots {{ grid-template-columns: 1fr 1fr; }} }}
</style>
<script>{script}</script></head>
<body><h1>{title}</h1>
{summary}
<div class="plots">{plots}</div>
{details}
<script>addEventListener("load", () => dispatchEvent(new Event("resize")))</script>
</body></html>
"""
