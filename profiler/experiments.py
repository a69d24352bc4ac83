"""Expected gains, tried: the same step with a data path that lacks what is said to cost."""

from collections.abc import Sequence
from dataclasses import replace

from maestri.engine.config import RunConfig
from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.filters import BlurConfig
from maestri.profiler.causes import Evidence, clamped, predicted_step
from maestri.profiler.findings import CACHED, Gain
from maestri.profiler.trial import Trial, mode_times, other_loader


def try_gains(trial: Trial, evidence: Evidence, gains: Sequence[Gain], steps: int, rounds: int) -> list[Gain]:
    """Returns the gains, and beside them those of settings that were tried; every rank must call it.

    Shapes stay as they are, so the same step runs: with twice the executor's threads, where there are cores for them;
    without colour and blur, where views have any.
    """
    images = evidence.images * evidence.world_size
    found = list(gains)
    for gain, config in _candidates(trial.config, evidence):
        with other_loader(trial, config):
            times = mode_times([trial.mode(CACHED, steps, lambda: None) for _ in range(rounds)])
        found.append(replace(gain, checked=images / times.step))
    return sorted(found, key=lambda gain: -gain.images_per_second)


def _candidates(config: RunConfig, evidence: Evidence) -> list[tuple[Gain, RunConfig]]:
    images = evidence.images * evidence.world_size
    found = []
    twice = 2 * evidence.num_threads
    if twice <= evidence.cores:
        gain = Gain(
            cause="decode",
            images_per_second=images / clamped(evidence, predicted_step(evidence, threads=twice)),
            knob=f"data.num_threads {twice}",
            experiment=f"data.num_threads {evidence.num_threads} → {twice}",
        )
        found.append((gain, replace(config, data=replace(config.data, num_threads=twice))))
    views = config.views
    plain = replace(views, colour=ColourConfig(), blur=BlurConfig(), solarise=(0.0,))
    if plain != views:
        without = clamped(evidence, predicted_step(evidence, scale={"augment": without_colour(evidence)}))
        gain = Gain(
            cause="augment",
            images_per_second=images / without,
            knob="views.colour, views.blur, views.solarise",
            experiment="views without colour, blur and solarise",
        )
        found.append((gain, replace(config, views=plain)))
    return found


def without_colour(evidence: Evidence) -> float:
    """Returns what is left of the seconds that making views takes when they have no colour."""
    seconds = {stage.name: stage.seconds_per_image for stage in evidence.stages}
    whole = sum(seconds.get(name, 0.0) for name in ("resize", "colour", "corrupt"))
    return 1.0 - seconds.get("colour", 0.0) / whole if whole else 1.0
