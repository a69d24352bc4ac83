"""Checks that the demo's run is whole and that something was learnt: ``python tools/check_demo.py runs/demo``."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "views.png", "curves.png", "checkpoints/latest")
LEARNT = ("student", "labelling_teacher", "reconstruction_teacher")
BASELINES = ("raw_pixels", "random_init")
INFORMATION = tuple(f"information_{level}_{role}" for level in ("class", "data") for role in ("student", "teacher"))


def faults(run: Path) -> Iterator[str]:
    """Yields a line for each thing that is wrong with the run."""
    missing = [name for name in FILES if not (run / name).is_file() or not (run / name).stat().st_size]
    yield from (f"{name} is missing or empty" for name in missing)
    if "summary.json" in missing:
        return
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if summary["images_per_second"] <= 0 or not 0 <= summary["data_wait_share"] <= 1:
        yield f"speed is {summary['images_per_second']} images/s, waiting {summary['data_wait_share']} of the time"
    knn = summary["knn"]
    if (knn["split"], knn["chosen_on"]) != ("test", "holdout"):
        yield f"figures are of {knn['split']} images, chosen on {knn['chosen_on']} ones; expected test and holdout"
    top1 = {model: figures["top1"] for model, figures in knn["top1"].items()}
    if absent := [model for model in (*LEARNT, *BASELINES) if model not in top1]:
        yield f"no accuracy of {', '.join(absent)}"
    elif top1["student"] <= top1["random_init"]:
        yield f"the student ({top1['student']:.2f} %) is not above its initialisation ({top1['random_init']:.2f} %)"
    yield from collapses(run)
    print(", ".join(f"{model} {value:.2f} %" for model, value in top1.items()))


def collapses(run: Path) -> Iterator[str]:
    """Yields a line for each level and role whose assignments tell less than before training, in the run's second half.

    The figure is the mutual information of the softmax before Sinkhorn, as a share of log K; the first row of the
    metrics is the untrained network's.  Random heads tell images apart too, and that is lost in the first steps
    before anything is learnt, so the first half is left out.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    for name in INFORMATION:
        before, after = rows[0][name], min(row[name] for row in rows[len(rows) // 2 :])
        if after <= before:
            yield f"{name} fell from {before:.3f} to {after:.3f}: the assignments collapsed"


def main() -> int:
    """Returns 0 if nothing is wrong, else 1."""
    if len(sys.argv) != 2:
        print("usage: check_demo.py RUN", file=sys.stderr)
        return 2
    found = list(faults(Path(sys.argv[1])))
    for line in found:
        print(f"check_demo.py: {sys.argv[1]}: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
