"""Starts command lines from one process that has imported everything, in a tenth of the time.

Each is a fork of it, begun afresh in all that the command line sees: arguments, environment, folder,
standard streams. It becomes the child of the test's process, so it dies and is waited for as any other.
All of them have the zygote's hashes of strings, and what libraries read from the environment when they are
imported: where that matters, `fresh=True`.
"""

from __future__ import annotations

import array
import ctypes
import gc
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from types import SimpleNamespace
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36


class Command(subprocess.Popen[str]):
    """`surefoot` with some arguments, as `subprocess.Popen` has it: forked from the zygote."""

    _zygote: socket.socket | None = None

    def _execute_child(self, *arguments: Any) -> None:
        given = by_name(arguments)
        pipes = {"p2cread": 0, "c2pwrite": 1, "errwrite": 2}
        streams = [given[name] if given[name] != -1 else number for name, number in pipes.items()]
        request = {
            "arguments": [str(a) for a in given["args"]],
            "environment": dict(given["env"]),
            "folder": str(given["cwd"] or os.getcwd()),
            "own_session": given["start_new_session"],
        }
        zygote = self._connection()
        set_subreaper = ctypes.CDLL(None).prctl
        set_subreaper(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:  # until the zygote answers; what else loses its parent meanwhile is nobody's
            socket.send_fds(zygote, [json.dumps(request).encode()], streams)
            self.pid = int(zygote.recv(64))
        finally:
            set_subreaper(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))

    @classmethod
    def _connection(cls) -> socket.socket:
        if cls._zygote is None:
            cls._zygote, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            theirs.close()
        return cls._zygote


class Forked(subprocess.Popen[bytes]):
    """What a supervisor that was forked from the zygote starts, as `subprocess.Popen` has it: a fork of the
    supervisor, whose streams it has.
    """

    def _execute_child(self, *arguments: Any) -> None:
        given = by_name(arguments)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if given["start_new_session"]:
                os.setsid()
            given["preexec_fn"]()
            os.environ.update(given["env"])
            _, _, _, *arguments_ = given["args"]  # python -m surefoot
            sys.argv = ["surefoot", *arguments_]
            surefoot.cli.main.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


def by_name(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What `subprocess.Popen._execute_child` got."""
    names = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
    return dict(zip(names, arguments, strict=True))


def serve(tests: socket.socket) -> None:
    """Forks until the tests are gone; returns in each child, which is to run the command line."""
    while True:
        text, streams, _, _ = socket.recv_fds(tests, 1 << 20, 3)
        if not text:
            os._exit(0)
        there, here = os.pipe()
        middle = os.fork()
        if not middle:
            pid = os.fork()
            if not pid:
                tests.detach()
                become(json.loads(text), streams)
                return
            os.write(here, str(pid).encode())
            os._exit(0)
        os.waitpid(middle, 0)  # now it is the test's child
        tests.send(os.read(there, 64))
        for number in (there, here, *streams):
            os.close(number)


def become(request: dict[str, Any], streams: array.array[int] | list[int]) -> None:
    if request["own_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 4096)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    numpy.random.seed()  # Python's own generator is seeded anew by the fork
    sys.path[0] = request["folder"]
    sys.argv = ["surefoot", *request["arguments"]]
    surefoot.launch.supervise.subprocess = SimpleNamespace(Popen=Forked)


if __name__ == "__main__":
    import numpy
    import plotly.graph_objects  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401

    import surefoot.cli.chaos
    import surefoot.cli.explain
    import surefoot.cli.export
    import surefoot.cli.main
    import surefoot.cli.replay
    import surefoot.launch.supervise

    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    surefoot.cli.main.main()
