"""Imports point down, never sideways between parts, never in a circle; optional packages have homes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "src/surefoot"
PARTS = {"data", "optim", "checkpoint", "guard", "record", "parallel", "measure"}
LEVELS = [
    {"errors"},
    {"keys", "types", "durable", "laps", "unchanged"},
    {"protocols", "compiled", "direct"},
    PARTS,
    {"segments", "draws"},
    {"state"},
    {"train_step"},
    {"passes"},
    {"keep", "stopping", "blame", "traced"},
    {"graph"},
    {"captured"},
    {"trials"},
    {"work"},
    {"heal", "choice"},
    {"course"},
    {"clock"},
    {"calm"},
    {"train"},
    {"recipe", "operations", "identity", "environment", "model"},
    {"mending"},
    {"resume", "run"},
    {"prepare"},
    {"build", "replays", "release"},
    {"export", "tune", "federated", "launch", "fleet"},
    {"api"},
    {"cli", "web"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
READERS = {"export", "fleet"}
READ_BY_READERS = {"record", "errors", "types"}
OPTIONAL = {"pyarrow", "tensorboard", "mlflow", "wandb", "optuna", "ray", "flwr", "opacus"}
LONGER_FOR_A_REASON = {
    "prepare.py": "everything that joins a recipe with operations",
    "export/explain.py": "one function per thing that is remarked on",
    "heal.py": "one story: going back, and what is tried",
    "cli/main.py": "one function per command, mostly signatures",
    "launch/chaos.py": "one story: a game day",
    "launch/faults.py": "one small function per fault",
    "operations.py": "every key with its default and meaning",
    "optim/schedules.py": "one small class per schedule",
    "record/incidents.py": "one small function per kind of event",
    "record/rows.py": "one format: blocks, ring, and checking both",
    "course.py": "updates, and what follows from each",
    "replays.py": "one story: a step taken again, compared, and looked into",
    "train.py": "the loop, and every way out of it",
    "train_step.py": "one update, whole",
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), ast.parse(path.read_text())


def imports(tree):
    """(module, whether only for type checkers)"""
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in hidden
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            yield node.module, id(node) in hidden


def edges():
    for path, tree in modules():
        if path == Path("__init__.py"):
            continue
        for name, only_types in imports(tree):
            if name == "surefoot" or name.startswith("surefoot."):
                yield path, name.removeprefix("surefoot").lstrip("."), only_types


@pytest.mark.parametrize("edge", list(edges()), ids=lambda e: f"{e[0]} -> {e[1]}")
def test_imports_point_down(edge):
    path, target, _ = edge
    if not target:  # the package itself: its version, lazily its names
        return
    importer, imported = path.parts[0].removesuffix(".py"), target.split(".")[0]
    if importer == imported:  # within a part
        return
    assert not (importer in PARTS and imported in PARTS), (
        f"{path} imports {target}: parts know nothing of each other. Join them in build.py, or move "
        "what both need into types.py or protocols.py"
    )
    assert LEVEL[imported] < LEVEL[importer], f"{path} imports {target}, which lies above it"
    if importer in READERS:
        assert imported in READ_BY_READERS, f"{path}: readers see the record only"


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for path, target, _ in edges():
        name = ".".join(path.with_suffix("").parts)
        graph.setdefault(name, set()).add(target)
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"import circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, [*trail, name])
            done.add(name)

    for name in list(graph):
        visit(name, [])


def test_an_optional_package_is_imported_by_the_file_named_after_it_only():
    for path, tree in modules():
        for name, _ in imports(tree):
            package = name.split(".")[0]
            assert package not in OPTIONAL or path.stem == package, f"{path} imports {package}"


def test_readers_of_the_log_need_no_torch():
    for path, tree in modules():
        if path.parts[0] in READERS | {"record"}:
            assert not any(name.split(".")[0] == "torch" for name, _ in imports(tree)), path


def test_nothing_is_unpickled_and_nothing_is_process_wide():
    for path, tree in modules():
        assert not any(n.split(".")[0] in ("pickle", "dill") for n, _ in imports(tree)), path
        text = ast.unparse(tree)
        assert "torch.load(" not in text, path
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), path


def test_folders_are_at_most_two_deep_and_files_are_short():
    long = set()
    for path, _ in modules():
        assert len(path.parts) <= 2, path
        if len((SOURCE / path).read_text().splitlines()) > 250:
            long.add(str(path))
    assert long == set(LONGER_FOR_A_REASON)


def test_an_eager_run_does_not_load_the_compiler(tmp_path):
    """It takes more than a second, and few runs compile. Torch's optimizers ask for it; they do so again
    afterwards.
    """
    code = """
import pathlib, sys
from torch.optim import Optimizer
import surefoot as sf
from conftest import recipe
specs = [sf.SGD(lr=0.1), sf.SGD(lr=0.1, momentum=0.9, nesterov=True), sf.Adam(), sf.AdamW(), sf.NAdamW(),
         sf.RMSprop(), sf.Adagrad(), sf.Adadelta()]
for i, spec in enumerate(specs):
    for most in (3, None):  # interrupted, and continued
        operations = sf.Operations(budget={"updates": most})
        done = sf.fit(recipe(optimizer=spec, until=6), out=pathlib.Path(f"run{i}"), operations=operations)
assert done.status == "finished"
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
sf.SGD(lr=0.1).build([{"params": [done.model[0].weight]}])
assert "torch._dynamo" in sys.modules
plain = Optimizer.add_param_group.__wrapped__
assert plain.__dynamo_disable is not plain
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
