"""Prints finished runs side by side, as Markdown: ``python benchmarks/compare_runs.py RUN RUN …``.

Test accuracy at the pooling and k that held-out training images chose, images seen, minutes and speed; then held-out
accuracy against images and minutes, the best pooling and k of each evaluation.  The last row of those has all
neighbours, the rows before it ``evaluation.train_images``: fewer neighbours find fewer right ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

BASELINES = ("raw_pixels", "random_init")


def load(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a run's summary and the rows of its metrics."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return summary, rows


def results(runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[str]:
    """Returns the table of final accuracies."""
    lines = ["| run | model | pooling, k | test top-1, % | images seen | minutes | images/s | data wait, % |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for name, (summary, _) in runs.items():
        speed = f"{summary['train_seconds'] / 60:.1f} | {summary['images_per_second']:,.0f}"
        wait = f"{100 * summary['data_wait_share']:.1f}"
        for model, entry in summary["knn"]["top1"].items():
            trained = model not in BASELINES
            mark = " ◂ chosen" if model == summary["knn"]["best_model"] else ""
            cost = f"{summary['images']:,} | {speed} | {wait}" if trained else "– | – | – | –"
            choice = f"{entry['pooling']}, {entry['k']}"
            lines.append(f"| {name} | {model}{mark} | {choice} | {entry['top1']:.2f} | {cost} |")
    return lines


def progress(name: str, summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Returns the table of a run's held-out accuracy while it trained."""
    minutes = {row["step"]: row["elapsed_seconds"] / 60 for row in rows if row["kind"] == "train"}
    per_step = summary["images"] / summary["steps"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    models = sorted({key.split("/")[1] for key in evaluations[0] if key.startswith("knn/")})
    lines = [f"| {name}: images seen | minutes | " + " | ".join(models) + " |", "|---:|---:|" + "---:|" * len(models)]
    for row in evaluations:
        cells = [max(value for key, value in row.items() if key.startswith(f"knn/{model}/")) for model in models]
        at = f"{row['step'] * per_step:,.0f} | {minutes.get(row['step'], 0.0):.1f}"
        lines.append(f"| {at} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def main(arguments: list[str]) -> int:
    """Prints the tables and returns 0; 2 without runs."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    runs = {Path(run).name: load(Path(run)) for run in arguments}
    print("\n".join(results(runs)))
    for name, (summary, rows) in runs.items():
        print()
        print("\n".join(progress(name, summary, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
