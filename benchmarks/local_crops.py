"""What local views cost MaskCluster's student: ``python benchmarks/local_crops.py``.

One step of the student — forward, loss, backward; neither teacher, which sees no local views, nor optimizer — with two
global views of 224 pixels and N local views of 96 against the same step without them.  The two are run in pairs, one
right after the other and in turn first, on one thread, and judged by the thread's own processor time, so that other
programs on the machine disturb as little as they can.  Printed as Markdown, beside the measured ratio of the medians:

- tokens: (2 · 197 + N · 37) / (2 · 197), what "a token costs what a token costs" says of the encoder;
- operations: the same ratio of multiplications and additions in all matrix products of the step, forward and backward.
  A token of a local view has 37 to attend to and not 197, and goes through no head of patches or pixels.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig
from maestri.model.maskcluster import Maskcluster, MaskclusterConfig
from maestri.pipelines.batch import Batch

GLOBAL, LOCAL, PATCH, NUM_GLOBAL, BATCH = 224, 96, 16, 2, 4
GLOBAL_TOKENS, LOCAL_TOKENS = (GLOBAL // PATCH) ** 2 + 1, (LOCAL // PATCH) ** 2 + 1


def new_method(*, dim: int, depth: int) -> Maskcluster:
    """Returns MaskCluster around a small ViT with small heads."""
    level = LevelConfig(head=HeadConfig(hidden=256, layers=2, bottleneck=64, prototypes=256))
    encoder = build_encoder(EncoderConfig(patch=PATCH, dim=dim, depth=depth, heads=dim // 64), image_size=GLOBAL)
    return Maskcluster(encoder, MaskclusterConfig(class_level=level, patch_level=level), num_steps=100)


def batch_of(num_local: int) -> Batch:
    """Returns a batch of noise."""

    def views(count: int, size: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, BATCH, 3, size, size), dtype=torch.uint8)

    clean = views(NUM_GLOBAL, GLOBAL)
    found = {"global": clean, "global_corrupted": clean}
    if num_local:
        found["local"] = views(num_local, LOCAL)
    return Batch(
        views=found,
        token_mask={"global": torch.rand(NUM_GLOBAL, BATCH, GLOBAL_TOKENS - 1) < 0.5},
        visible={},
        masked={},
        labels=torch.full((BATCH,), -1),
        rows=torch.arange(BATCH),
        position=0,
    )


class Step:
    """The student's step on one batch, with the teacher's labels made before."""

    def __init__(self, method: Maskcluster, num_local: int) -> None:
        self._method, self._batch = method, batch_of(num_local)
        with torch.no_grad():
            self._targets = method.targets(self._batch, 0)

    def __call__(self) -> float:
        """Runs it; returns seconds of this thread's processor time."""
        self._method.student.zero_grad()
        start = time.thread_time()
        loss, _ = self._method.loss(self._method.student(self._batch), self._targets, 0)
        # torch computes the gradients of CPU tensors in this very thread.
        loss.backward()
        return time.thread_time() - start

    def operations(self) -> int:
        """Returns multiplications and additions of its matrix products."""
        with FlopCounterMode(display=False) as counter:
            self()
        return int(counter.get_total_flops())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="measured pairs of steps, after 3 that are not")
    parser.add_argument("--dim", type=int, default=192, help="width of the encoder")
    parser.add_argument("--depth", type=int, default=6, help="its blocks")
    parser.add_argument("--local", type=int, nargs="+", default=[2, 6, 10], help="numbers of local views")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = new_method(dim=arguments.dim, depth=arguments.depth)
    without = Step(method, 0)
    print("| local views | tokens | operations | measured | to tokens, % | to operations, % | ms without | ms with |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for num_local in arguments.local:
        steps = (without, Step(method, num_local))
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(-3, arguments.pairs):
            for which in (pair % 2, 1 - pair % 2):
                seconds = steps[which]()
                if pair >= 0:
                    times[which].append(seconds)
        base, longer = (statistics.median(values) for values in times)
        tokens = 1 + num_local * LOCAL_TOKENS / (NUM_GLOBAL * GLOBAL_TOKENS)
        operations = steps[1].operations() / steps[0].operations()
        measured = longer / base
        print(
            f"| {num_local} | {tokens:.3f} | {operations:.3f} | {measured:.3f} | {100 * (measured / tokens - 1):+.1f} "
            f"| {100 * (measured / operations - 1):+.1f} | {1e3 * base:.0f} | {1e3 * longer:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
