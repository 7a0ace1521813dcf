"""The command ``surefoot``."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

import surefoot
from surefoot.cli import tables
from surefoot.errors import OperationsError, RunDirectoryError, SurefootError, failure_class
from surefoot.launch import NOTE
from surefoot.run import open_run

INTERRUPTED = 75

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Trains PyTorch models by mini-batch gradient descent, and shows how it went.",
)
_PIPE_WIDTH = 160  # columns where there is no terminal to ask


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


out, err = _console(stderr=False), _console(stderr=True)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any operations key.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def main() -> None:
    """Runs the command line.

    Exit codes: 0 finished; 1 failed; 2 bad usage or recipe; 3 diverged; 4 budget reached; 75
    interrupted, the same command continues.
    """
    atexit.register(_end_deaf)  # before all others, so that it is called after them
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(prog_name="surefoot")
    except _Interrupted:
        err.print("interrupted; run the same command to go on")
        _leave_when_asked(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        _leave_when_asked(end.code if isinstance(end.code, int) else bool(end.code))
        raise
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class _Interrupted(BaseException):
    """A signal outside the training loop. Not KeyboardInterrupt: argument parsing turns that into exit
    code 130, and the interpreter, if it passes an extension module's import, into death by SIGINT.
    """


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one changes nothing any more
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Interrupted


def _leave_when_asked(code: int) -> None:
    """From now on signals end the process, with that exit code: something may hang while it ends."""

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def _end_deaf() -> None:
    """The last thing that Python calls: what comes after it must not take the place of the exit code. If
    the interpreter does not end within a minute, an alarm ends it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that are raised on purpose are printed, and give their exit code."""
    try:
        yield
    except SurefootError as error:
        _tell_supervisor(error)
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:  # a second Ctrl-C within the training loop
        raise _Interrupted from None
    except Exception as error:
        _tell_supervisor(error)
        raise


def _tell_supervisor(error: Exception) -> None:
    if NOTE in os.environ:
        with suppress(OSError):
            note = {"failure": failure_class(error), "error": f"{type(error).__name__}: {error}"}
            Path(os.environ[NOTE]).write_text(json.dumps(note))


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"surefoot {surefoot.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Trains PyTorch models by mini-batch gradient descent, and shows how it went."""


@app.command(add_help_option=False)
def train(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A recipe file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the recipe.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Run directory; runs/<name of FILE> if left out.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move a run that lies in --out aside and begin anew.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = None,
    workers: Annotated[str | None, typer.Option(help="Processes that read a Dataset.")] = None,
    compiled: Annotated[str | None, typer.Option("--compile", help="auto, on or off.")] = None,
    threads: Annotated[str | None, typer.Option(help="Threads of CPU kernels.")] = None,
    progress: Annotated[str | None, typer.Option(help="auto, on or off.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Steps that torch's profiler records, into the run.")
    ] = None,
    sets: Sets = None,
    wants_help: Annotated[bool, typer.Option("--help", help="Show this, and the options of FILE.")] = False,
) -> None:
    """Train a recipe. The same command again continues the run, or says that it has ended."""
    if wants_help or file is None:
        _train_help(context, file)
        raise typer.Exit(0 if wants_help else 2)
    with _errors():
        from surefoot.cli.train import Order, run_order

        named = {
            "device": device,
            "data.workers": workers,
            "compute.compile": compiled,
            "compute.threads": threads,
            "progress": progress,
            "profile": profile,
        }
        flags = {key: value for key, value in named.items() if value is not None}
        order = Order(file, settings or [], out_dir, fresh, {**flags, **_pairs(sets or [])})
        code = run_order(order, out, err)
    raise typer.Exit(code)


def _train_help(context: typer.Context, file: Path | None) -> None:
    out.print(context.get_help(), markup=False)
    if file is not None:
        with _errors():
            from surefoot.cli.recipe_file import RecipeFile

            recipe = RecipeFile(file)
            out.print(f"\nOptions of {file}, as key=value:")
            out.print(tables.options(recipe.options()))
    out.print("\nOperations, for --set, surefoot.toml and the environment (SUREFOOT_...):")
    from surefoot.operations import known_keys

    out.print(tables.operations(known_keys()))


def _pairs(settings: list[str]) -> dict[str, Any]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise OperationsError(f"--set {setting!r} has no value.", fix="--set key=value")
        pairs[key] = value
    return pairs


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def supervise(
    context: typer.Context,
    most: Annotated[int, typer.Option("--crashes", min=1, help="Without progress, until it gives up.")] = 5,
    first_s: Annotated[float, typer.Option("--pause", min=0.0, help="Seconds, doubled each time.")] = 1.0,
) -> None:
    """Run `train ...` (after --), and start it again when it crashes: surefoot supervise -- train FILE."""
    with _errors():
        from surefoot.launch.supervise import Supervisor, run_directory

        if context.args[:1] != ["train"]:
            raise OperationsError(
                f"supervise: {' '.join(context.args) or 'nothing'} is not a training command.",
                fix="surefoot supervise -- train FILE [KEY=VALUE]... --out DIR",
            )

        def say(text: str) -> None:
            err.print(text, markup=False, soft_wrap=True)

        supervisor = Supervisor(context.args, run_directory(context.args), most, first_s, say)
        code = supervisor.run()
    raise typer.Exit(code)


Faults = Annotated[
    list[str] | None, typer.Option("--fault", metavar="NAME", help="May be given again; all if left out.")
]


@app.command()
def chaos(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recipe file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options.")] = None,
    faults: Faults = None,
    at: Annotated[
        int | None, typer.Option("--at", min=1, help="Step of the fault; half-way if left out.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Go on with copies of this interrupted run.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="An empty folder for all runs.")] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> None:
    """A game day: train undisturbed and with faults. What is survived, and at what cost?"""
    with _errors():
        from surefoot.cli.chaos import play
        from surefoot.cli.train import Order

        flags = {"checkpoint.every": 50, "progress": "off", **_pairs(sets or [])}
        order = Order(file, settings or [], out_dir, False, flags)
        code = play(order, faults or [], run, at, as_json=as_json, out=out, err=err)
    raise typer.Exit(code)


tune = typer.Typer(help="Choose settings by measuring.", no_args_is_help=True)
app.add_typer(tune, name="tune")


@tune.command()
def compute(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recipe file.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only measure.")] = False,
    sets: Sets = None,
) -> None:
    """Measure which way to compute is fastest for a recipe, and write that to surefoot.toml beside it."""
    with _errors():
        from surefoot.cli.train import Order
        from surefoot.cli.tune import compute as tune_compute

        order = Order(file, settings or [], None, False, _pairs(sets or []))
        tune_compute(order, dry_run=dry_run, out=out, err=err)


@app.command()
def show(path: RunPath, as_json: AsJson = False) -> None:
    """Show a run: status, metrics, interventions, digest of the weights."""
    with _errors():
        view = open_run(path)
        summary = view.summary()
        if as_json:
            tables.print_json(summary)
        else:
            out.print(tables.run(summary, view.identity))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Looks below it.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show all runs below a folder side by side."""
    with _errors():
        if not folder.is_dir():
            raise RunDirectoryError(f"{folder} is not a folder.", fix="Give one that holds runs.")
        summaries = []
        for identity in sorted(folder.rglob("run.json")):
            try:
                summaries.append(open_run(identity.parent).summary())
            except (SurefootError, OSError) as error:
                err.print(f"{identity.parent}: {error}", style="yellow", markup=False, soft_wrap=True)
        if as_json:
            tables.print_json(summaries)
        elif summaries:
            out.print(tables.runs(summaries))
        else:
            out.print(f"no runs below {folder}")


@app.command()
def export(
    path: RunPath,
    to: Annotated[str, typer.Option("--to", help="csv, jsonl or parquet.")] = "csv",
    target: Annotated[Path | None, typer.Option("--out", help="File; standard output if left out.")] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Also rows of steps repeated after a restart.")
    ] = False,
) -> None:
    """Export the step log."""
    with _errors():
        from surefoot.cli.export import export_log

        export_log(open_run(path).log(all_rows=all_rows), to, target)


@app.command()
def verify(path: RunPath, as_json: AsJson = False) -> None:
    """Verify every byte of every checkpoint, the ledger, the log and the events."""
    with _errors():
        view = open_run(path)
        findings = view.verify()
        if as_json:
            tables.print_json([finding._asdict() for finding in findings])
        else:
            for finding in findings:
                err.print(f"{finding.file}: {finding.what}", style="red", soft_wrap=True)
            kept, rows = view.checkpoints(), len(view.log()["step"])
            found = f"{len(findings)} findings" if findings else "all sound"
            out.print(f"{found}: {len(kept)} checkpoints, {rows:,} rows, ledger and events")
    raise typer.Exit(1 if findings else 0)


@app.command()
def explain(path: RunPath, as_json: AsJson = False) -> None:
    """Explain, from log and events alone, what happened, what it cost and what to do."""
    with _errors():
        from surefoot.cli.explain import explain_run, show

        told = explain_run(open_run(path))
        if as_json:
            tables.print_json(told.to_json())
        else:
            show(told, out)


@app.command()
def release(
    path: RunPath,
    ids: Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Samples.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are left out.")] = False,
) -> None:
    """Let samples that were left out take part again, once the run continues."""
    with _errors():
        from surefoot.release import release as release_samples

        if bool(ids) == everything:
            raise OperationsError(
                "release: which samples?",
                fix="surefoot release RUN ID..., or --all; see surefoot show RUN.",
            )
        came_back, step = release_samples(path, None if everything else ids)
        told = ", ".join(map(str, came_back[:20])) + (" ..." if len(came_back) > 20 else "")
        out.print(f"from step {step:,} on these samples take part again: {told}", soft_wrap=True)


@app.command()
def replay(
    path: RunPath,
    step: Annotated[int, typer.Option("--step", min=0, help="Counted from 0.")],
    file: Annotated[
        Path | None, typer.Option("--recipe", help="The recipe file, if it is not where it was.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Also write all of it to this JSON file.")
    ] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> None:
    """Take a step again: does it reproduce, bit for bit, and what was in it? Exit code 1 if it differs."""
    with _errors():
        from surefoot.cli.replay import replay_run

        code = replay_run(
            path, step, file, target, _pairs(sets or []), err if as_json else out, err, as_json
        )
    raise typer.Exit(code)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file; report.html in the first RUN if left out."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run or several."""
    with _errors():
        from surefoot.cli.export import write_report

        file = target or paths[0] / "report.html"
        write_report([open_run(path) for path in paths], file)
        out.print(f"wrote {file}", soft_wrap=True)
