"""Starts a program that ends with whoever started it, on some of the processor's cores:

    python -m maestri.study.tied PARENT CORES PROGRAM …

PARENT is the process id of the starter, CORES a list as ``0,1``.  A study that is killed leaves no training behind,
which would hold the folder that the next study continues.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Collection, Sequence

PR_SET_PDEATHSIG = 1
"""Linux: the signal that this process gets when its parent dies; it outlives ``exec``."""


def tied(command: Sequence[str], cores: Collection[int]) -> list[str]:
    """Returns the command that starts a Python program tied to this process, on these cores.

    Args:
        command: what follows ``python``.
        cores: numbers of cores.
    """
    own = [sys.executable, "-m", "maestri.study.tied", str(os.getpid()), ",".join(map(str, sorted(cores)))]
    return [*own, sys.executable, *command]


def main(arguments: Sequence[str]) -> None:
    """Becomes the program."""
    parent, cores, *command = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
