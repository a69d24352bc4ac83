"""One process among many: set-up from the environment, quiet libraries, and an exit that always ends."""

import logging
import os
import random
import socket
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from maestri.engine.errors import RunError
from maestri.engine.meeting import join

QUIET_MODULES = ("deepspeed", "torch", "nvidia", "timm", "tensorboard", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands."""

    rank: int
    """0-based, over all machines."""
    world_size: int
    """Processes in the run."""
    local_rank: int
    """0-based, on this machine."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and shows the display."""
        return self.rank == 0


def environment_rank() -> int:
    """Returns this process's rank as the launcher gave it, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment(device: str) -> torch.device:
    """Returns this process's device and sets what DeepSpeed reads from the environment when it is imported.

    Without a launcher the process becomes rank 0 of 1.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: CUDA is asked for and there is none, or this machine has more processes than GPUs.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("engine.device is 'cuda' but no CUDA device is visible; use --engine.device cpu")
    use_cuda = has_cuda and device != "cpu"
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("LOCAL_RANK", "0")
    if not use_cuda:
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if found.index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {found.index} has no GPU, this process sees {torch.cuda.device_count()}; "
            "start one process a GPU and let each see all of its machine's"
        )
    torch.cuda.set_device(found)
    return found


def start(device: torch.device, *, timeout_minutes: float, verbose: bool = False) -> Ranks:
    """Joins the process group (NCCL on a GPU, else gloo) and returns this process's place in it.

    Raises:
        ConnectionError: not all ranks came in time.
    """
    if not verbose:
        quiet_libraries()
    import deepspeed

    if not verbose:
        _raise_log_levels()  # again: DeepSpeed sets the level of its logger when it is imported
    # Built by ninja on first use otherwise: a compiler and half a minute, for a reduction gloo already does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    try:
        join(backend, timeout)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"not all {os.environ['WORLD_SIZE']} ranks met at {where}: {one_line(error)}") from error
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)  # takes the group there is
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        device=device,
    )


def quiet_libraries() -> None:
    """Silences the notes of the libraries around us; warnings raised from our own modules still show."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # what torch's profiler says of itself
    for name in QUIET_MODULES:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    _raise_log_levels()


def _raise_log_levels() -> None:
    for name in (*QUIET_MODULES, "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seeds torch's generators on every device and Python's."""
    torch.manual_seed(seed)
    random.seed(seed)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of ``values`` over ranks, in place; one collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def first_failure(error: str, control: dist.ProcessGroup | None) -> str:
    """Returns the first rank's error text, ``""`` if no rank has one; every rank must call it, in step."""
    if dist.get_world_size() == 1:
        return error
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, error, group=control)
    return next((f"{text} (rank {rank})" for rank, text in enumerate(found) if text), "")


def control_group() -> dist.ProcessGroup | None:
    """Returns a gloo group for small messages between hosts that must not wait for a GPU; None means the default."""
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def agree(error: Exception | None, control: dist.ProcessGroup | None = None) -> None:
    """Raises RunError on every rank if ``error`` is set on any; every rank must call it.

    For failures that one rank alone may meet, such as a folder that one machine does not have.
    """
    failure = first_failure(one_line(error) if error else "", control)
    if failure:
        raise RunError(failure) from error


def one_line(error: BaseException) -> str:
    """Returns an error as one line for a user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def is_lost_rank(error: BaseException) -> bool:
    """Returns whether an error is a collective's that another rank left; the cause is in that rank's output."""
    text = str(error)
    return (
        isinstance(error, dist.DistError)
        or isinstance(error, RuntimeError)
        and ("gloo" in text or "NCCL" in text or "ProcessGroup" in text)
    )


def wait_for_all() -> None:
    """Waits until every rank is here."""
    if dist.get_world_size() > 1:
        dist.barrier()


def leave(code: int, *, orderly: bool) -> NoReturn:
    """Ends the process with ``code``.

    gloo's threads abort about 5 % of plain interpreter exits (a finished collective dropped while the interpreter
    is finalized), so the group is drained and destroyed and then the process ends without finalization.  Close
    loaders and logs before.

    Args:
        orderly: Whether every rank comes here; False after an error on this rank alone, and then nothing is waited for.
    """
    if dist.is_available() and dist.is_initialized() and orderly:
        with suppress(RuntimeError):
            wait_for_all()
            time.sleep(0.1)
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
