"""The public face is a promise: names are pinned, and each says what it is."""

import inspect
import subprocess
import sys

import surefoot as sf

NAMES = (  # noqa: SIM905
    "Adadelta Adafactor Adagrad Adam AdamW Arrays Batch DataError Dataset EarlyStopping Group "
    "Guard NAdamW Operations OperationsError Outcome RMSprop Recipe RecipeError Replayed Result "
    "RunDirectoryError RunView SGD StateError SurefootError UsageError Validation clip_norm "
    "clip_value constant cosine digest exponential fit hold inverse_sqrt linear one_cycle "
    "open_run plateau replay_step restarts step steps supervised warmup"
).split()


def test_public_names():
    assert sorted(sf.__all__) == sorted(NAMES), "a new name is a reviewed change: add it here and to docs/"
    assert set(NAMES) <= set(dir(sf))


def test_every_public_thing_has_a_docstring():
    for name in NAMES:
        thing = getattr(sf, name)
        doc = inspect.getdoc(thing)
        assert doc, name
        assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclasses make"
        for method, member in vars(thing).items() if inspect.isclass(thing) else ():
            if not method.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{name}.{method}"


def test_no_module_hides_a_public_name():
    """Importing a submodule sets it as an attribute of its package, over what was there (decision 10)."""
    code = (
        "import importlib, pkgutil, types, surefoot\n"
        "for module in pkgutil.walk_packages(surefoot.__path__, 'surefoot.'):\n"
        "    if module.name != 'surefoot.__main__':\n"
        "        importlib.import_module(module.name)\n"
        "hidden = [n for n in surefoot.__all__ if isinstance(getattr(surefoot, n), types.ModuleType)]\n"
        "assert not hidden, hidden\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    code = (
        "import sys, surefoot\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'plotly', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
