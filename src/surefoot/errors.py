"""Everything surefoot raises on purpose.

::

    SurefootError                 exit code
    ├── UsageError                2   the caller can mend it; nothing was changed
    │   ├── RecipeError               what is to be learned does not make sense
    │   ├── OperationsError           how it is to be run does not make sense
    │   ├── DataError                 a source gave something else than it promised
    │   └── RunDirectoryError         the output folder is not what the command needs
    └── StateError                1   kept state is missing, torn or altered

A message says what is wrong and where, then why, then what to do, one line each.
"""

import difflib
import errno
from collections.abc import Iterable
from typing import Literal


class SurefootError(Exception):
    """Base of all errors that surefoot raises on purpose."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        lines = [what]
        if why:
            lines.append(f"  why: {why}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class UsageError(SurefootError):
    """The caller can mend this: bad recipe, bad setting, wrong folder."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe does not describe a training that can be run."""


class OperationsError(UsageError):
    """A setting of how to run is unknown, of the wrong type or out of range."""


class DataError(UsageError):
    """A source is empty, changed, or returned something else than asked for."""


class RunDirectoryError(UsageError):
    """The run directory holds something else, is in use, or does not exist."""


class StateError(SurefootError):
    """Kept state is missing, torn or altered."""


class PoisonedError(StateError):
    """Kept state is as it was written, and holds numbers that are not finite."""


class WorkerError(SurefootError):
    """Processes that read data die or hang again and again."""


class FormatError(StateError):
    """Kept state is whole, but of a format that this version does not read."""


FailureClass = Literal["out_of_memory", "disk", "signal", "user", "state", "unknown"]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)


def failure_class(error: BaseException) -> FailureClass:
    """What kind of trouble ended a process; decides whether starting it again can help."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, OSError) and cause.errno in _DISK for cause in causes):
        return "disk"
    match error:
        case WorkerError():
            return "out_of_memory" if "-9" in error.what + error.why else "unknown"
        case UsageError():
            return "user"
        case StateError():
            return "state"
        case KeyboardInterrupt():
            return "signal"
        case MemoryError():
            return "out_of_memory"
    oom = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return "out_of_memory" if oom else "unknown"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known word closest to `name`, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # compute.compil <- "compile": compare the last part alone
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.5)
        close = [by_leaf[leaf[0]]] if leaf else []
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known) or 'none'}."
