"""What all tests share."""

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Ranks that tests start would otherwise have a thread per core each.  Set before torch and numpy are imported.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# A test must not depend on who else uses the machine's launcher variables.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# Below a shell's background job it is ignored, by all that tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # other programs may take the machine from an example
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files of long tests first: begun last, they would run when nothing is left beside them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def locks(process: int) -> Path:
    """Returns the folder of what the workers of a process lock."""
    return Path(tempfile.gettempdir()) / f"maestri-tests-{process}"


def pytest_configure(config: pytest.Config) -> None:
    """Makes it, where workers will be started."""
    if not hasattr(config, "workerinput"):
        locks(os.getpid()).mkdir(exist_ok=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(locks(os.getpid()), ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout, too: to wait for a turn is no test's fault
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Runs a test marked ``alone``, and its fixtures, while no other worker runs any."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    operation = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    # Whoever waits to be alone holds the gate, so that nobody else begins meanwhile.
    with (locks(os.getppid()) / "gate").open("a") as gate, (locks(os.getppid()) / "turn").open("a") as turn:
        fcntl.flock(gate, operation)
        fcntl.flock(turn, operation)
        if operation == fcntl.LOCK_SH:
            fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)
