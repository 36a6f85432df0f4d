"""Processes of their own that begin with the libraries imported: forked from one that did nothing else.

A new interpreter spends four seconds of processor time on importing torch, transformers and peft. Where a test needs a
process for itself (its memory, its limits, its own path of packages) and not that import, it calls :func:`run` instead
of :func:`subprocess.run`; FlexP itself is imported by the process, not before the fork.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TextIO

from filelock import FileLock

LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.models.bert.modeling_bert", "peft", "datasets")
# As flexp.cost.probe has it for the process in which it measures memory; and no reserves of pyarrow's.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_WAIT_POLICY": "passive",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

STARTED: list[subprocess.Popen[bytes]] = []


def run(
    command: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python -m MODULE ARGUMENTS`` or ``python -c CODE ARGUMENTS`` does, without the name of the interpreter."""
    server = _server()
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        where = str(cwd or Path.cwd())
        task = {"command": command, "env": dict(os.environ if env is None else env), "cwd": where}
        server.write(json.dumps([task, str(out), str(err)]) + "\n")
        server.flush()
        code = int(server.readline())
        return subprocess.CompletedProcess(command, code, out.read_text("utf-8"), err.read_text("utf-8"))


@lru_cache
def _server() -> TextIO:
    """A connection to the server, which all workers of a test run have in common; it ends with the last connection."""
    place = _place(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
    connection = socket.socket(socket.AF_UNIX)
    with FileLock(f"{place}.lock"):
        if not Path(place).exists():
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(place)
                listening.listen()
                environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
                command = [sys.executable, str(Path(__file__)), place, str(listening.fileno())]
                nothing, passed = subprocess.DEVNULL, [listening.fileno()]
                STARTED.append(
                    subprocess.Popen(command, pass_fds=passed, stdin=nothing, stdout=nothing, env=environment)
                )
        connection.connect(place)
    return connection.makefile("rw", encoding="utf-8")


def _place(run: str) -> str:
    return str(Path(tempfile.gettempdir(), f"flexp-warm-{run}"))


def _serve(place: str, listening: socket.socket) -> None:
    """Never returns."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # what is forked looks through what it made
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a child
    held: dict[socket.socket, TextIO] = {}
    while True:
        for ready in select.select([listening, *held], [], [])[0]:
            if ready is listening:
                connection = listening.accept()[0]
                held[connection] = connection.makefile("rw", encoding="utf-8")
            elif line := held[ready].readline():
                if not os.fork():
                    _answer(held[ready], line)
            else:
                del held[ready]
        if not held:
            with FileLock(f"{place}.lock"):
                if not select.select([listening], [], [], 0)[0]:
                    for file in (place, f"{place}.lock"):
                        Path(file).unlink(missing_ok=True)
                    os._exit(0)


def _answer(asking: TextIO, line: str) -> None:
    """Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    task, out, err = json.loads(line)
    child = os.fork()
    if not child:
        _become(task["command"], task["env"], task["cwd"], out, err)
    asking.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    asking.flush()
    os._exit(0)


def _become(command: list[str], env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    """Never returns."""
    code = 1
    try:
        for number, name in enumerate((os.devnull, out, err)):
            os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[0:1] = [cwd, *paths]  # what it replaces is the folder of this file
        flag, what, *rest = command
        sys.argv = [what, *rest]
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
