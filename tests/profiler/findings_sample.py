"""A profile as of ViT-S/16 with two teachers on four GPUs, whose loader is a little slow; made up, but plausible."""

import random
from collections.abc import Mapping
from dataclasses import replace

from maestri.profiler.findings import (
    CACHED,
    COLD,
    CROWDED,
    REAL,
    RESIDENT,
    UNNAMED,
    Gain,
    Mark,
    ModeTimes,
    Moment,
    Part,
    Profile,
    RankSummary,
    Stage,
    Wait,
)

IMAGES = 1024
ROUNDS = 6
STEPS = 12
MODEL_MS = {
    "labelling_teacher": 27.4,
    "reconstruction_teacher": 27.1,
    "encoder": 9.6,
    "decoder": 25.8,
    "loss": 5.9,
    "encoder backward": 19.4,
    "decoder backward": 49.7,
    "gradient all-reduce": 4.1,
    "optimizer": 3.6,
    "averages": 1.9,
    UNNAMED: 2.8,
}
FLOPS = {
    "labelling_teacher": 2_355_000_000_000,
    "reconstruction_teacher": 2_355_000_000_000,
    "encoder": 602_000_000_000,
    "decoder": 2_530_000_000_000,
    "loss": 161_000_000_000,
    "encoder backward": 1_204_000_000_000,
    "decoder backward": 5_060_000_000_000,
}
WAIT_MS = 36.0
HOLDS = {"student": ("encoder", "decoder"), "backward": ("decoder backward", "encoder backward", "gradient all-reduce")}
"""What is named around them in the timeline."""


def sample_profile(*, seed: int = 0, slower: float = 1.0, noise: float = 0.01, rounds: int = ROUNDS) -> Profile:
    """Returns it, with ``noise`` (a standard deviation) on each round and on each part of each step.

    ``slower`` stretches every step, evenly over its parts.
    """
    chance = random.Random(seed)
    parts_ms = {**MODEL_MS, "data": WAIT_MS}
    drifts = [slower * chance.gauss(1, noise) for _ in range(rounds)]
    parts = {
        name: [1e-3 * middle * drift * chance.gauss(1, noise) for drift in drifts for _ in range(STEPS)]
        for name, middle in parts_ms.items()
    }
    sums = [sum(step) for step in zip(*parts.values(), strict=True)]
    by_round = [sums[begin : begin + STEPS] for begin in range(0, len(sums), STEPS)]
    modes = {
        REAL: ModeTimes(seconds=by_round, waits=[1e-3 * WAIT_MS * drift for drift in drifts]),
        **{
            name: _mode(chance, noise, slower * factor * sum(MODEL_MS.values()), wait, rounds)
            for name, (factor, wait) in {
                RESIDENT: (1.0, 0.0),
                CACHED: (1.17, 29.0),
                COLD: (1.31, 53.0),
                CROWDED: (1.03, 0.0),
            }.items()
        },
    }
    real, resident = modes[REAL].step, modes[RESIDENT].step
    return Profile(
        title="imagenet_plmae.yaml: PL-MAE, ViT-S/16, 4 × NVIDIA L40S",
        images=IMAGES,
        world_size=4,
        modes=modes,
        loader_images_per_second=[IMAGES / 0.211 * chance.gauss(1, noise) for _ in range(rounds)],
        parts=[
            Part(name=name, seconds=seconds, flops=FLOPS.get(name, 0))
            for name, seconds in sorted(parts.items(), key=lambda item: -sum(item[1]))
        ],
        timeline=_timeline(),
        stall=1 - resident / real,
        noise=max(modes[REAL].means) / real / 2 - min(modes[REAL].means) / real / 2,
        verdict=f"Training waits for data: {100 * (1 - resident / real):.0f} % of a step is not the model's; "
        "decoding JPEG is the limit, and more workers would help.",
        **_SETUP,
    )


def bare_profile() -> Profile:
    """Returns one that was interrupted in its first round on a CPU, with next to nothing in it."""
    return replace(
        sample_profile(),
        title="demo.yaml: MAE, cpu",
        world_size=1,
        images=16,
        modes={REAL: ModeTimes(seconds=[[0.21, 0.2, 0.22]], waits=[0.0])},
        loader_images_per_second=[],
        parts=[Part(name="student", seconds=[0.2, 0.19, 0.21]), Part(name=UNNAMED, seconds=[0.01, 0.01, 0.01])],
        timeline=[],
        stages=[],
        ranks=[],
        gains=[],
        memory={},
        memory_peak={},
        memory_curve=(),
        waits=(),
        host_memory={},
        settings={},
        stall=0.0,
        cause="compute",
        verdict="The model is the limit.",
        complete=False,
    )


def _mode(chance: random.Random, noise: float, step_ms: float, wait_ms: float, rounds: int) -> ModeTimes:
    drifts = [chance.gauss(1, noise) for _ in range(rounds)]
    return ModeTimes(
        seconds=[[1e-3 * step_ms * drift * chance.gauss(1, noise / 2) for _ in range(STEPS)] for drift in drifts],
        waits=[1e-3 * wait_ms * drift for drift in drifts],
    )


def _timeline() -> list[Mark]:
    """Returns the marks in their order: what is around others before them."""
    lengths: Mapping[str, float] = {"data": WAIT_MS, **MODEL_MS}
    marks: list[Mark] = []
    now = 0.0
    for name in ("data", "labelling_teacher", "reconstruction_teacher", "student", "loss", "backward"):
        begin = now
        inside = []
        for piece in HOLDS.get(name, (name,)):
            inside.append(Mark(name=piece, begin=now, end=now + 1e-3 * lengths[piece]))
            now = inside[-1].end
        marks += [Mark(name=name, begin=begin, end=now), *inside] if name in HOLDS else inside
    for name in ("optimizer", "averages"):
        now += 0.9e-3  # the unnamed rest
        marks.append(Mark(name=name, begin=now, end=now + 1e-3 * lengths[name]))
        now = marks[-1].end
    return marks


_RANK_MS = {name: middle for name, middle in {**MODEL_MS, "data": WAIT_MS}.items() if name != UNNAMED}
_SETUP = {
    "hardware": {
        "gpu": "4 × NVIDIA L40S, 48 GB",
        "cpu": "AMD EPYC 9354, 32 cores",
        "host memory": "378 GB",
        "store": "/data/imagenet, ext4 on NVMe",
        "torch": "2.9.1+cu130",
        "deepspeed": "0.19.8",
        "driver": "580.82",
    },
    "settings": {
        "recipe": "configs/imagenet_plmae.yaml",
        "images per step": "1,024",
        "precision": "bf16",
        "ZeRO stage": "1",
        "compile": "on",
        "executor": "cpu",
        "workers": "8 per rank",
        "commit": "d5a663a",
    },
    "stages": [
        Stage(name="read", seconds_per_image=0.00011, threads=2),
        Stage(name="decode", seconds_per_image=0.0044, threads=8, pool="workers"),
        Stage(name="augment", seconds_per_image=0.0021, threads=8, pool="workers"),
        Stage(name="collate", seconds_per_image=0.00031, threads=1),
        Stage(name="transfer", seconds_per_image=0.00014, threads=1),
    ],
    "ranks": [
        RankSummary(
            rank=rank,
            parts={
                name: 1e-3 * middle * (1 + 0.004 * rank)
                + (1e-3 * 11.5 if (rank, name) == (2, "data") else 0)
                + (1e-3 * 11.0 if rank != 2 and name == "gradient all-reduce" else 0)
                for name, middle in _RANK_MS.items()
            },
        )
        for rank in range(4)
    ],
    "flops_per_second": 181.3e12,
    "bytes_per_second": 742e9,
    "memory": {
        "parameters": 96_300_000,
        "masters": 48_100_000,
        "moments": 96_300_000,
        "module of labelling_teacher": 43_300_000,
        "module of reconstruction_teacher": 43_300_000,
        "average of labelling_teacher": 86_700_000,
        "average of reconstruction_teacher": 86_700_000,
        "activations": 11_400_000_000,
        "gradients and buckets": 610_000_000,
        "state": 2_100_000,
    },
    "memory_peak": {
        "data": 700_000_000,
        "labelling_teacher": 3_900_000_000,
        "reconstruction_teacher": 4_000_000_000,
        "student": 9_800_000_000,
        "loss": 10_600_000_000,
        "backward": 12_512_800_000,
        "optimizer": 1_900_000_000,
        "averages": 1_300_000_000,
    },
    "memory_curve": [
        Moment(seconds=1e-3 * when, bytes=held * 10**6, part=part)
        for when, held, part in (
            (0, 512, "data"),
            (40, 3900, "labelling_teacher"),
            (60, 4000, "reconstruction_teacher"),
            (70, 1200, "student"),
            (110, 9800, "student"),
            (120, 10600, "loss"),
            (125, 12513, "encoder backward"),
            (180, 4000, "encoder backward"),
            (200, 1900, "optimizer"),
            (210, 1300, "averages"),
            (215, 512, "averages"),
        )
    ],
    "waits": [Wait(place="model/plmae.py:187", operation="item", count=4)],
    "host_memory": {
        "rank 0": 6_200_000_000,
        "worker 41827": 1_150_000_000,
        "worker 41828": 1_148_000_000,
        "pinned": 616_000_000,
        "page cache of shards": 41_300_000_000,
    },
    "cause": "decode",
    "gains": [
        Gain(
            cause="decode",
            images_per_second=5630,
            knob="--data.workers 12 (8 now), or store shards at 256 px",
            checked=5540,
            experiment="bytes decoded before, on the same threads",
        ),
        Gain(
            cause="compute",
            images_per_second=5480,
            knob="--engine.compile on for the decoder; it reaches 54 % of the peak",
        ),
        Gain(
            cause="contention",
            images_per_second=4960,
            knob="--data.threads 1 in each worker",
            checked=4890,
            experiment="the loader beside a batch that stays",
        ),
        Gain(cause="transfer", images_per_second=4850, knob="--data.pin true"),
    ],
}
