"""Long proof about a run: killed at any moment and started again, it ends where an undisturbed one does.

    python tools/prove_training.py [--kills 50] [--seed 0] [--ranks 2]

A small PL-MAE is trained on CPU ranks under torchrun, and everything that it has started is killed (SIGKILL): at any
moment of its start, of its training, and while and right after it writes a checkpoint.  Then the same command runs
again, over and over, until the run is complete; in the end all rows but their times, and all tensors of the last
checkpoint (student, teachers, moments, the method's state) must be those of an undisturbed run, bit for bit: ranks are
as many, the hardware is the same, and the CPU's kernels repeat themselves.  The suite runs a short form.  Exit code 1
if anything went wrong.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from small_run import Started, difference, last_step, on_ranks, started, wait_until, write_inputs

from maestri.engine.checkpoint import latest

MOMENTS = {"start": 1, "training": 2, "checkpoint": 2}
"""When to kill, and how often each; a run killed at its start gets no further."""


class Watch:
    """What a run does since its start, as its folder shows it."""

    def __init__(self, out: Path) -> None:
        """Looks at the folder as it is before the start."""
        found = latest(out)
        self.out = out
        self.first_step = int(found.name.removeprefix("step_")) if found else 0
        self._logged = self._log_time()
        self._drafts = self._draft_times()

    def _log_time(self) -> int:
        log = self.out / "metrics.jsonl"
        return log.stat().st_mtime_ns if log.is_file() else 0

    def _draft_times(self) -> set[tuple[str, int]]:
        times = set()
        for path in (self.out / "checkpoints").glob(".step_*.tmp"):
            try:
                times.add((path.name, path.stat().st_ctime_ns))
            except FileNotFoundError:
                continue  # renamed meanwhile
        return times

    def trains(self) -> bool:
        """Returns whether a step is done."""
        return self._log_time() != self._logged and last_step(self.out) > self.first_step

    def writes(self) -> bool:
        """Returns whether a checkpoint is being written; what an earlier run has left of one is none."""
        return bool(self._draft_times() - self._drafts)

    def landing(self) -> str:
        """Returns where a kill has met the run."""
        if self.writes():
            return "while a checkpoint was written"
        return "between steps and checkpoints" if self.trains() else "before the first step"


class Durations:
    """Seconds that the parts of an undisturbed run take."""

    def __init__(self, run: Started, watch: Watch) -> None:
        """Follows a run to its end."""
        began = time.monotonic()
        wait_until(watch.trains, run)
        self.start = time.monotonic() - began
        wait_until(watch.writes, run)
        drafted = time.monotonic()
        wait_until(lambda: not watch.writes(), run)
        self.draft = time.monotonic() - drafted
        self.code = run.wait()
        self.training = time.monotonic() - began - self.start


def kill_at(moment: str, run: Started, watch: Watch, durations: Durations, dice: random.Random) -> bool:
    """Kills a run at a random time of one of the ``MOMENTS``; returns whether it was still running."""
    if moment == "start":
        wait_until(lambda: False, run, dice.uniform(0.0, durations.start))
    else:
        wait_until(watch.trains, run)
    if moment == "training":
        wait_until(lambda: False, run, dice.uniform(0.0, 0.7) * durations.training)
    if moment == "checkpoint":
        for _ in range(dice.randint(1, 4)):
            wait_until(lambda: not watch.writes(), run)
            wait_until(watch.writes, run)
        time.sleep(dice.uniform(0.0, 1.3) * durations.draft)
    alive = run.process.poll() is None
    run.kill()
    return alive


def problems(
    folder: Path,
    moments: Iterable[str],
    durations: Durations,
    *,
    ranks: int,
    dice: random.Random,
    landings: Counter[str],
    flags: tuple[str, ...] = (),
) -> Iterator[str]:
    """Yields what is wrong after a kill at each of ``moments``.

    Args:
        folder: with the inputs and the undisturbed run, ``whole``.
        moments: keys of ``MOMENTS``, one a kill.
        durations: of the undisturbed run.
        ranks: processes a run.
        dice: for the time of each kill.
        landings: gets the number of kills by what they have met.
        flags: of train.py.
    """
    out, output = folder / "killed", folder / "killed.log"
    command = on_ranks(ranks, "--out", out.name, *flags)
    waiting = list(moments)
    while True:
        watch = Watch(out)
        run = started(command, folder, output=output)
        if waiting and kill_at(waiting[0], run, watch, durations, dice):
            landings[watch.landing()] += 1
            waiting.pop(0)
            continue
        after = f"after {landings.total()} kills"
        if code := run.wait():
            yield f"{after}: the run ended with {code}; {output.read_text(errors='replace')[-2000:]}"
            return
        if code is None:
            yield f"{after}: the run never ended"
            return
        if found := difference(out, folder / "whole"):
            yield f"{after}: {found}"
        else:
            print(f"  {after}: complete, and as undisturbed", flush=True)
        if not waiting:
            return
        shutil.rmtree(out)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    moments = dice.choices(list(MOMENTS), list(MOMENTS.values()), k=options.kills)
    landings: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        watch = Watch(folder / "whole")
        durations = Durations(started(on_ranks(options.ranks, "--out", "whole"), folder), watch)
        if durations.code != 0:
            print(f"prove_training.py: the undisturbed run ended with {durations.code}", file=sys.stderr)
            return 1
        print(
            f"undisturbed on {options.ranks} ranks: {durations.start:.1f} s of start, {durations.training:.1f} s of "
            f"training and ending, {1000 * durations.draft:.0f} ms a checkpoint",
            flush=True,
        )
        found = list(problems(folder, moments, durations, ranks=options.ranks, dice=dice, landings=landings))
    print(f"{landings.total()} kills: {len(found)} problems, {time.monotonic() - began:.0f} s")
    for landing, count in landings.most_common():
        print(f"  {count} {landing}")
    for problem in found:
        print(f"  {problem}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
