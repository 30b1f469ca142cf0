"""Processes with everything imported: `python -m inlaid ...` and `python FILE.py ...` in milliseconds.

A server imports what the commands import and forks. In between is a client, this file as a program: it takes
the arguments of `python`, lends its standard streams, environment and folder to the process that the server
forks, hands signals on, and ends as that ends. So to whoever launches it, a shell, `torchrun` (by
`PYTHON_EXEC`) or `subprocess`, it is `python`. When the client is killed, so is its process.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

PLACE = "INLAID_TESTS_FORKS"
"""The environment variable with the address of the server."""
PRELOADED = [
    "av",
    "inlaid.cli",
    "peft.tuners.lora.bnb",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "diffusers.pipelines.mochi.pipeline_mochi",
    "transformers.models.t5.modeling_t5",
    "transformers.models.umt5.modeling_umt5",
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
]
"""What the commands import sooner or later, besides our own modules."""
FORWARDED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
_server: subprocess.Popen[bytes] | None = None


def python() -> Path:
    """A program that may be called as `python` is; waits for the server, and starts it if nobody has."""
    start()
    place = Path(os.environ[PLACE])
    until = time.monotonic() + 300
    while not place.exists():
        assert time.monotonic() < until and (_server is None or _server.poll() is None), "no server of forks"
        time.sleep(0.05)
    return place.with_name("python")


def start() -> None:
    """Starts the server, which is there for this process and all that it starts."""
    global _server
    if PLACE not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="inlaid-forks-"))
        shim = folder / "python"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "$@"\n', "utf-8")
        shim.chmod(0o755)
        environment = {**os.environ, PLACE: str(folder / "socket")}
        environment.setdefault("OMP_NUM_THREADS", "1")
        _server = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, env=environment
        )
        os.environ[PLACE] = environment[PLACE]
        atexit.register(_stop, _server, folder)


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait(timeout=30)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


# --- the client ---------------------------------------------------------------------------------------------


def client(arguments: list[str]) -> NoReturn:
    """Has the server fork, and ends as the fork ends."""
    if arguments[:1] == ["-u"]:  # how torchrun calls Python
        arguments = arguments[1:]
    if arguments[:2] != ["-m", "inlaid"] and not arguments[0].endswith(".py"):
        os.execv(sys.executable, [sys.executable, *arguments])
    pid = 0
    early: list[int] = []

    def forward(number: int, _: object) -> None:
        if pid:
            os.kill(pid, number)
        else:
            early.append(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(os.environ[PLACE])
        text = json.dumps([arguments, dict(os.environ), str(Path.cwd())]).encode()
        streams = array.array("i", [0, 1, 2])
        line.sendmsg([len(text).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        line.sendall(text)
        answers = line.makefile()
        pid = int(answers.readline())
        for number in early:
            os.kill(pid, number)
        code = int(answers.readline() or 1)
    if code < 0:  # of a signal: die of the same
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


# --- the server ---------------------------------------------------------------------------------------------


def preload() -> None:
    """Imports everything that the commands import."""
    import importlib

    import inlaid
    from inlaid.console import quiet

    quiet()
    assert all(callable(getattr(inlaid, name)) for name in inlaid.__all__)  # which imports all of it
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve() -> None:
    """Imports everything, then forks for every client until the test session ends."""
    preload()
    waking, waken = socket.socketpair()
    waking.setblocking(False), waken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for pytest
    signal.set_wakeup_fd(waken.fileno())
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door, selectors.DefaultSelector() as waiting:
        place = Path(os.environ[PLACE])
        door.bind(str(place.with_name("door")))
        door.listen(16)
        for source in (door, waking, sys.stdin):
            waiting.register(source, selectors.EVENT_READ)
        place.with_name("door").rename(place)  # now that it is open
        while True:
            for key, _ in waiting.select():
                source = key.fileobj
                if source is sys.stdin:  # closed
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    return
                if source is waking:
                    waking.recv(4096)
                    _reap(running, waiting)
                elif source is door:
                    line, _ = door.accept()
                    pid = _fork(line)
                    running[pid] = line
                    line.sendall(b"%d\n" % pid)
                    waiting.register(line, selectors.EVENT_READ)
                elif source in running.values():  # the client is gone
                    (pid,) = (p for p, line in running.items() if line is source)
                    waiting.unregister(source)
                    os.kill(pid, signal.SIGKILL)


def _reap(running: dict[int, socket.socket], waiting: selectors.BaseSelector) -> None:
    for pid, line in [*running.items()]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del running[pid]
            if line in {key.fileobj for key in waiting.get_map().values()}:
                waiting.unregister(line)
                line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            line.close()


def _fork(line: socket.socket) -> int:
    head, rights, _, _ = line.recvmsg(4, socket.CMSG_LEN(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(rights[0][2])
    text = b""
    while len(text) < int.from_bytes(head, "little"):
        text += line.recv(1 << 16)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        return pid
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup ignore it
        _become(*json.loads(text), list(streams))
    finally:
        os._exit(1)  # never back into the server's loop


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> NoReturn:
    """Makes this fork what `python ARGUMENTS` would be."""
    import runpy
    import traceback

    import torch

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    code = 0
    try:
        if module:
            runpy.run_module("inlaid", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        client(sys.argv[1:])
