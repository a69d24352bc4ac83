"""Runs programs in a Python that has imported the libraries already, for tests that start many processes.

Importing torch, torchvision, timm and DeepSpeed takes five to ten seconds of a core.  A server imports them once and
forks for each program, which then finds its own arguments, folder, environment and output, imports this project
itself, and has an exit code and a process id as any other; it can be killed.  It sees no GPU, and not the libraries
being imported: tests of these start a Python of their own.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "timm.models.vision_transformer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "scipy.optimize",
    "sklearn.cluster",
    "matplotlib.figure",
    "nvidia.dali.fn",
    "cv2",
    "tyro",
    "omegaconf",
)
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Read when libraries are loaded: what a program says of them comes too late.  A server of one thread can be forked."""
NO_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""A process that has spoken to a GPU can't be forked: these programs run on the CPU."""
LARGEST = 2**20
"""Bytes of a message."""


# ---------------------------------------------------------------------------------------------------------- the server


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Forks for each request.

    Returns:
        In a forked process, the program to run; None in the server, when nobody asks any more.
    """
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # what the libraries hold is neither looked through nor, by that, copied in every program
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads run after the imports; a process with threads must not be forked")
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: set[int] = set()
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is woken:
                woken.recv(4096)
                for number, status in ended_children():
                    running.discard(number)
                    channel.send(json.dumps({"pid": number, "status": status}).encode())
                continue
            text, files, *_ = socket.recv_fds(channel, LARGEST, 2)
            if not text:
                for number in running:
                    os.kill(number, signal.SIGKILL)
                return None
            number = os.fork()
            if number == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for opened in (selector, woken, wake, channel):
                    opened.close()
                for target, file in enumerate(files, start=1):
                    os.dup2(file, target)
                    os.close(file)
                asked: dict[str, Any] = json.loads(text)
                return asked
            running.add(number)
            for file in files:
                os.close(file)
            channel.send(json.dumps({"pid": number}).encode())


def ended_children() -> list[tuple[int, int]]:
    """Returns ids and statuses of the children that have ended."""
    found = []
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(child)
    return found


def run_program(asked: Mapping[str, Any]) -> None:
    """Runs a program as ``python PROGRAM …`` or ``python -m MODULE …`` would, in this process."""
    os.environ.clear()
    os.environ.update(asked["environment"] | NO_GPU)
    os.chdir(asked["folder"])
    if asked["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"],) * 2)
    words: list[str] = asked["words"]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = asked["folder"]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        gc.unfreeze()  # or libraries tell, at the end, of what was not collected


# ---------------------------------------------------------------------------------------------------------- the client


@dataclass(kw_only=True)
class Program:
    """A program that was started; as ``subprocess.Popen``."""

    server: "Server"
    pid: int
    words: list[str]
    files: Sequence[IO[bytes]]
    """What takes its output and its errors; closed once it has ended."""
    returncode: int | None = None
    """What ``subprocess`` would say: negative for a signal."""
    said: tuple[str, ...] = ("", "")
    """Its output and its errors, once it has been waited for."""

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        self.server.hear(0.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it ran longer than ``timeout`` seconds; it is killed.
        """
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.words, timeout)
            self.server.hear(min(1.0, timeout))
        if self.files:
            self.said = tuple(read_from_start(file) for file in self.files)
            self.files = ()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def completed(self, timeout: float) -> "subprocess.CompletedProcess[str]":
        """Waits for it, and returns what it has written; raises as ``wait``."""
        return subprocess.CompletedProcess(self.words, self.wait(timeout), *self.said)


def read_from_start(file: IO[bytes]) -> str:
    """Returns what stands in a file, and closes it."""
    with file:
        file.seek(0)
        return file.read().decode()


@dataclass
class Server:
    """The process that forks; it ends with this one."""

    process: "subprocess.Popen[bytes]"
    channel: socket.socket
    programs: "weakref.WeakValueDictionary[int, Program]" = field(default_factory=weakref.WeakValueDictionary)

    @classmethod
    def start(cls) -> "Server":
        """Starts it; the libraries are imported meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=os.environ | THREADS | NO_GPU | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        server = cls(process, ours)
        atexit.register(server.end)
        return server

    def end(self) -> None:
        """Ends it, and the programs that run."""
        self.channel.close()
        self.process.communicate()

    def launch(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str], *, file_bytes: int = 0
    ) -> Program:
        """Starts ``python WORDS`` in a folder; files larger than ``file_bytes`` fail as on a full disk."""
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        asked = {
            "words": list(words),
            "folder": str(folder.resolve()),
            "environment": dict(environment),
            "file_bytes": file_bytes,
        }
        socket.send_fds(self.channel, [json.dumps(asked).encode()], [file.fileno() for file in files])
        while (number := self.hear(None)) is None:
            continue
        program = Program(server=self, pid=number, words=list(words), files=files)
        self.programs[number] = program
        return program

    def hear(self, timeout: float | None) -> int | None:
        """Takes a message, if one comes in time; returns the id of a program that was started."""
        self.channel.settimeout(timeout)
        try:
            text = self.channel.recv(LARGEST)
        except (TimeoutError, BlockingIOError):
            return None
        if not text:
            _, errors = self.process.communicate()
            raise RuntimeError(f"the server ended: {errors.decode()[-2000:]}")
        told = json.loads(text)
        if "status" not in told:
            return int(told["pid"])
        program = self.programs.get(told["pid"])
        if program is not None:
            program.returncode = os.waitstatus_to_exitcode(told["status"])
        return None


_servers: list[Server] = []


def launch(
    words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, file_bytes: int = 0
) -> Program:
    """Starts ``python WORDS`` from this process's server, which is started if there is none yet."""
    if not _servers:
        _servers.append(Server.start())
    return _servers[0].launch(words, cwd or Path.cwd(), os.environ if env is None else env, file_bytes=file_bytes)


def on_ranks(
    ranks: int, words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> list[Program]:
    """Starts a program once for each rank of a process group on this machine, as ``torchrun`` would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [launch(words, cwd=cwd, env={**(os.environ if env is None else env), **place}) for place in places]


def completed(programs: Sequence[Program], timeout: float) -> "subprocess.CompletedProcess[str]":
    """Waits for programs that were started together: a code other than 0 of any, what all have written."""
    ended = [program.completed(timeout) for program in programs]
    code = next((done.returncode for done in ended if done.returncode), 0)
    output, errors = ("".join(said) for said in zip(*((done.stdout, done.stderr) for done in ended), strict=True))
    return subprocess.CompletedProcess(programs[0].words, code, output, errors)


if __name__ == "__main__":
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        run_program(asked)
