"""Two machines rehearsed on one: a network namespace each, a cable between them, and a launcher in each.

    python tools/rehearse_nodes.py [--launcher torchrun | deepspeed] [--steps 40]
                                   [--proof same | rank | node | cable | absent]

The two train a small PL-MAE in a shared folder, by the scripts of docs/clusters.  In the end all rows but their times
and all tensors of the last checkpoint must be, bit for bit, those of two ranks on one machine.

same: nothing happens to them.
rank: one is killed in mid-training; torchrun starts all again.
node: all of the second machine's processes are killed, and its command is typed again; torchrun goes on.
cable: it is pulled in mid-training.  Both sides must end within ``engine.timeout_minutes`` and a margin, each with one
clear line; with the cable in again, the same commands continue the run.
absent: one of the two, either, never comes.  The other must end within the same time, with one clear line.

Needs Linux with ``ip`` (iproute2), ``unshare`` and ``nsenter`` (util-linux), and root, or a kernel that lets a user
make namespaces.  They have no names and end with this program, however it ends.  Exit code 1 if anything went wrong, 2
if this machine cannot do it.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from small_run import (
    PROGRAM,
    RECIPE,
    Started,
    difference,
    last_step,
    on_ranks,
    started,
    wait_until,
    write_inputs,
)

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"
OUT = "nodes"
TIMEOUT_MINUTES = 0.3
IMPATIENT = ("--engine.timeout_minutes", str(TIMEOUT_MINUTES))
MARGIN = 45.0
"""Seconds after ``engine.timeout_minutes`` in which both sides must have ended; torchrun gives its ranks 30."""


class NoNamespaces(Exception):
    """This machine does not let us make network namespaces."""


def held(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Returns a process that ``command`` has put into new namespaces; it ends with its stdin, that is, with us."""
    words = [*command, "sh", "-c", "echo; exec cat"]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout is not None and holder.stderr is not None
    if not holder.stdout.readline():
        said = " ".join(holder.stderr.read().decode().split())
        raise NoNamespaces(f"this machine does not let us make namespaces: {said}; run it as root")
    return holder


class Node:
    """A machine of the rehearsal: a network namespace that lives as long as a process in it."""

    def __init__(self, rank: int, enter: Sequence[str]) -> None:
        """Makes the namespace; ``enter`` is the start of a command that may."""
        self.rank = rank
        self.holder = held([*enter, "unshare", "--net"])
        self._enter = [*enter, "nsenter", "--net", "--target", str(self.holder.pid)]

    def inside(self, *command: str) -> list[str]:
        """Returns a command as it is run on this node."""
        return [*self._enter, *command]

    def ip(self, *words: str) -> None:
        """Sets up the node's network."""
        done = subprocess.run(self.inside("ip", *words), capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split())
            raise NoNamespaces(f"ip {' '.join(words)} failed: {said}; run it as root")

    def plug(self, state: str) -> None:
        """Plugs this node's end of the cable in (``up``) or pulls it (``down``)."""
        self.ip("link", "set", CABLE, state)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Yields two nodes with a cable between them, and takes them down."""
    with ExitStack() as stack:
        enter: list[str] = []
        if os.geteuid():  # a user namespace, in which we are root
            keeper = held(["unshare", "--user", "--map-root-user"])
            stack.callback(end, keeper)
            enter = ["nsenter", "--user", "--preserve-credentials", "--target", str(keeper.pid)]
        nodes = []
        for rank in range(2):
            nodes.append(Node(rank, enter))
            stack.callback(end, nodes[-1].holder)
        first, second = nodes
        ends = ("name", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(second.holder.pid))
        first.ip("link", "add", *ends)
        for node, address in zip(nodes, ADDRESSES, strict=True):
            node.ip("address", "add", f"{address}/24", "dev", CABLE)
            node.ip("link", "set", "lo", "up")
            node.plug("up")
        yield nodes


def end(holder: "subprocess.Popen[bytes]") -> None:
    """Ends a process that holds a namespace."""
    holder.kill()
    holder.communicate()


# ------------------------------------------------------------------------------------------------------- commands


def node_command(launcher: str, *flags: str) -> list[str]:
    """Returns what is typed on each node, in a folder with a ``hostfile``."""
    script = PROGRAM.parent / "docs" / "clusters" / f"{launcher}.sh"
    return ["bash", str(script), RECIPE, *flags]


def node_variables(launcher: str, rank: int, restarts: int) -> dict[str, str]:
    """Returns the environment of the command on node ``rank``."""
    found = {"FIRST": ADDRESSES[0], "GLOO_SOCKET_IFNAME": CABLE, "DS_ACCELERATOR": "cpu"}
    found["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if launcher == "torchrun":
        return found | {"ADDRESS": ADDRESSES[rank], "NODES": "2", "GPUS": "1", "RESTARTS": str(restarts)}
    return found | {"HOSTFILE": "hostfile", "NODE_RANK": str(rank)}


def start_on(node: Node, folder: Path, launcher: str, *flags: str, restarts: int = 0) -> Started:
    """Starts a run on a node; what it says goes to ``node_N.log``."""
    command = node.inside(*node_command(launcher, *flags))
    variables = node_variables(launcher, node.rank, restarts)
    return started(command, folder, output=folder / f"node_{node.rank}.log", **variables)


def said(folder: Path, rank: int) -> str:
    """Returns what node ``rank`` said."""
    return (folder / f"node_{rank}.log").read_text(encoding="utf-8", errors="replace")


# --------------------------------------------------------------------------------------------------------- proofs


def completed(runs: list[Started], folder: Path) -> Iterator[str]:
    """Yields what is wrong with a run on both nodes that should come to its end."""
    codes = [run.wait() for run in runs]
    for rank, code in enumerate(codes):
        if code != 0:
            yield f"node {rank} ended with {code}: {said(folder, rank)[-3000:]}"
    if codes == [0, 0] and (found := difference(folder / OUT, folder / "whole")):
        yield f"not what two ranks on one machine give: {found}"


def timely(ranks: list[int], runs: list[Started], folder: Path) -> Iterator[str]:
    """Yields what is wrong with how runs on the nodes ``ranks`` end that cannot go on."""
    began = time.monotonic()
    limit = 60 * TIMEOUT_MINUTES + MARGIN
    for rank, run in zip(ranks, runs, strict=True):
        code = run.wait(max(0.0, limit - (time.monotonic() - began)))
        passed, text = time.monotonic() - began, said(folder, rank)
        lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
        print(f"  node {rank} ended with {code} after {passed:.0f} s: {' | '.join(lines)}", flush=True)
        if code in (0, None):
            yield f"node {rank} ended with {code} within {limit:.0f} s"
        if sum(f": rank {rank}: " in line for line in lines) != 1 or f'{PROGRAM}", line' in text:
            yield f"node {rank} has no single clear line: {text[-3000:]}"


def disturbed(proof: str, nodes: list[Node], folder: Path, launcher: str, *flags: str) -> Iterator[str]:
    """Yields what is wrong with a run to which that happens which ``proof`` says."""
    restarts = 3 if proof in ("rank", "node") else 0
    first_flags = (*flags, *IMPATIENT) if proof == "cable" else flags
    runs = [start_on(node, folder, launcher, *first_flags, restarts=restarts) for node in nodes]
    if proof != "same" and not wait_until(lambda: last_step(folder / OUT) >= 6, runs[0]):
        yield f"node 0 does not train: {said(folder, 0)[-3000:]}"
        return
    if proof == "rank":
        os.kill(runs[1].ranks()[0], signal.SIGKILL)
    if proof == "node":
        runs[1].kill()
        runs[1] = start_on(nodes[1], folder, launcher, *flags, restarts=restarts)
    if proof == "cable":
        nodes[1].plug("down")
        yield from timely([0, 1], runs, folder)
        nodes[1].plug("up")
        runs = [start_on(node, folder, launcher, *flags) for node in nodes]
    yield from completed(runs, folder)


def rehearsed(proof: str, folder: Path, launcher: str, steps: int) -> Iterator[str]:
    """Yields what is wrong; ``folder`` holds the inputs and the run on one machine, ``whole``."""
    flags = ("--out", OUT, "--steps", str(steps))
    (folder / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n", encoding="utf-8")
    with two_nodes() as nodes:
        if proof == "absent":
            for node in nodes:
                yield from timely([node.rank], [start_on(node, folder, launcher, *flags, *IMPATIENT)], folder)
        else:
            yield from disturbed(proof, nodes, folder, launcher, *flags)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--proof", choices=("same", "rank", "node", "cable", "absent"), default="same")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        lacking = " and no ".join(missing)
        print(f"rehearse_nodes.py: there is no {lacking}; install iproute2 and util-linux", file=sys.stderr)
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        alone = on_ranks(2, "--out", "whole", "--steps", str(options.steps))
        if options.proof != "absent" and started(alone, folder).wait():
            print("rehearse_nodes.py: two ranks on one machine failed", file=sys.stderr)
            return 1
        try:
            found = list(rehearsed(options.proof, folder, options.launcher, options.steps))
        except NoNamespaces as error:
            print(f"rehearse_nodes.py: {error}", file=sys.stderr)
            return 2
    print(f"{options.proof} under {options.launcher}: {len(found)} problems, {time.monotonic() - began:.0f} s")
    for problem in found:
        print(f"  {problem}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
