"""train.py as a user runs it: one process, two ranks, killed, stopped, misconfigured."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from small_run import write_shards

from maestri.engine.checkpoint import load_weights

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).resolve().parents[1] / "train.py"
CONFIG = """
steps: 24
seed: 3
data: {shards: shards, num_threads: 1}
views: {size: 32}
encoder: {patch: 8, dim: 32, heads: 2, depth: 2, drop_path: 0.2}
batch: {global_size: 8}
method:
  plmae:
    decoder: {dim: 24, depth: 1, heads: 2}
    class_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    data_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    reconstruction: {codes: 16, head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
engine: {device: cpu, precision: fp32, threads: 1}
checkpoint: {every: 5, keep: 2}
logging: {every: 3, tensorboard: false}
"""

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of noise, the configuration and one undisturbed run, ``whole``."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    done = train_cold(folder, "--out", "whole", "--logging.tensorboard", "True")
    assert done.returncode == 0, done.stderr
    return folder


def train_cold(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Runs train.py to its end in a Python of its own."""
    command = [sys.executable, str(PROGRAM), "tiny.yaml", *flags]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def train(folder: Path, *flags: str, ranks: int = 1, file_bytes: int = 0) -> "subprocess.CompletedProcess[str]":
    """Runs train.py to its end; files larger than ``file_bytes`` fail as on a full disk."""
    words = [str(PROGRAM), "tiny.yaml", *flags]
    if ranks > 1:
        return warm_python.completed(warm_python.on_ranks(ranks, words, cwd=folder, env=ENVIRONMENT), timeout=120)
    return warm_python.launch(words, cwd=folder, env=ENVIRONMENT, file_bytes=file_bytes).completed(timeout=120)


def start_and_signal(folder: Path, number: signal.Signals, *, rows: int, flags: list[str]) -> int:
    """Starts train.py, sends it a signal once ``rows`` rows are logged, and returns its exit code."""
    log = folder / flags[flags.index("--out") + 1] / "metrics.jsonl"
    process = warm_python.launch([str(PROGRAM), "tiny.yaml", *flags], cwd=folder, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count("\n") >= rows:
            break
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def losses_of(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["loss_reconstruction"]) for row in rows_of(run)]


def one_line(text: str) -> str:
    """Returns the only line of an error output."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def test_train__leaves_the_run_in_its_folder(folder: Path) -> None:
    run = folder / "whole"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "views.png", "tensorboard"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000020", "step_00000024"]
    assert (run / "config.yaml").read_text().startswith("# commit: ")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 24 and summary["images"] == 24 * 8
    assert summary["images_per_second"] > 0 and 0 <= summary["data_wait_share"] <= 1
    first, row = rows_of(run)[:2]
    assert (first["step"], row["step"]) == (1, 3)  # the first row is the untrained network's
    assert {"loss", "learning_rate", "momentum_labelling_teacher", "seconds/averages"} <= set(row)


def test_train__is_quiet_without_a_terminal(folder: Path) -> None:
    done = train_cold(folder, "--out", "quiet", "--steps", "3")
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(line.startswith("step ") for line in done.stdout.splitlines())


def test_train__last_evaluation_as_those_before_it(folder: Path) -> None:
    done = train(folder, "--out", "apart", "--steps", "3", "--data.holdout", "16", "--evaluation.full_at_end", "False")
    assert done.returncode == 0, done.stderr
    knn = json.loads((folder / "apart/summary.json").read_text())["knn"]
    assert set(knn["top1"]) == {"student", "labelling_teacher", "reconstruction_teacher"}, "no baselines"


def test_train__after_sigkill_continues_bit_equal(folder: Path) -> None:
    code = start_and_signal(folder, signal.SIGKILL, rows=4, flags=["--out", "killed"])
    assert code == -signal.SIGKILL
    assert 4 <= len(rows_of(folder / "killed")) < 8
    again = train(folder, "--out", "killed")
    assert again.returncode == 0 and "continuing killed after step" in again.stdout
    assert losses_of(folder / "killed") == losses_of(folder / "whole")


def test_train__damaged_checkpoint_is_told_and_the_one_before_continued(folder: Path) -> None:
    shutil.copytree(folder / "whole", folder / "torn")
    newest = folder / "torn" / "checkpoints" / "step_00000024"
    weights = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(weights[: len(weights) // 2])
    again = train(folder, "--out", "torn", "--logging.tensorboard", "True")
    told = " ".join(again.stdout.split())
    assert again.returncode == 0, again.stderr
    assert "step_00000024 is damaged: optimizer.safetensors is not what was written; continuing the one before" in told
    assert "continuing torn after step 20" in told
    assert losses_of(folder / "torn") == losses_of(folder / "whole")
    for checkpoint in (folder / "torn" / "checkpoints").glob("step_*"):
        (checkpoint / "method.safetensors").unlink()
    refused = train(folder, "--out", "torn", "--logging.tensorboard", "True")
    assert refused.returncode == 1
    assert "no checkpoint of torn can be continued" in one_line(refused.stderr)


def test_train__continues_on_two_ranks_at_another_stage(folder: Path) -> None:
    flags = ["--out", "moved", "--encoder.drop_path", "0"]
    assert start_and_signal(folder, signal.SIGTERM, rows=3, flags=flags) == 75
    again = train(folder, *flags, "--engine.zero_stage", "3", ranks=2)
    told = " ".join(again.stdout.split())
    assert again.returncode == 0, again.stderr
    assert "written by 1 CPU rank:" in told and "changed settings: engine.zero_stage (1 → 3)" in told
    still = train(folder, "--out", "still", "--encoder.drop_path", "0")
    assert still.returncode == 0
    for found, expected in zip(losses_of(folder / "moved"), losses_of(folder / "still"), strict=True):
        assert found == pytest.approx(expected, rel=5e-5)


def test_train__sigterm_writes_a_checkpoint_and_exits_75(folder: Path) -> None:
    flags = ["--out", "stopped", "--checkpoint.every", "0"]
    assert start_and_signal(folder, signal.SIGTERM, rows=2, flags=flags) == 75
    assert (folder / "stopped" / "checkpoints" / "latest").is_file()
    assert train(folder, *flags).returncode == 0
    assert losses_of(folder / "stopped") == losses_of(folder / "whole")


def test_train__two_ranks_at_zero_3_equal_one(folder: Path) -> None:
    flags = ["--engine.zero_stage", "3", "--encoder.drop_path", "0", "--steps", "6", "--logging.every", "1"]
    flags += ["--data.holdout", "16"]
    one, two = train(folder, "--out", "one", *flags), train(folder, "--out", "two", *flags, ranks=2)
    assert one.returncode == two.returncode == 0, two.stderr
    found, expected = losses_of(folder / "two"), losses_of(folder / "one")
    for (step, *losses), (_, *references) in zip(found, expected, strict=True):
        assert losses == pytest.approx(references, rel=5e-6), step


def test_train__full_disk_is_one_line_and_keeps_the_checkpoint_before(folder: Path) -> None:
    flags = ["--out", "full", "--steps", "8"]
    assert start_and_signal(folder, signal.SIGTERM, rows=1, flags=[*flags, "--logging.every", "1"]) == 75
    before = (folder / "full" / "checkpoints" / "latest").read_text()
    done = train(folder, *flags, file_bytes=100_000)
    assert done.returncode == 1
    assert "could not write checkpoint" in one_line(done.stderr)
    checkpoints = folder / "full" / "checkpoints"
    assert (checkpoints / "latest").read_text() == before
    assert [path.name for path in checkpoints.glob("*step*")] == [before.strip()]
    assert train(folder, *flags).returncode == 0


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--encoder.dept", "3"], 2, "unknown flag '--encoder.dept'; did you mean '--encoder.depth'?"),
        (["--out", "whole", "--encoder.depth", "1"], 1, "encoder.depth (2 → 1)"),
        (["--out", "odd", "--batch.global_size", "7"], 1, "the nearest that does: 6 or 8"),
        (["--out", "none", "--data.shards", "missing"], 1, "there is no folder missing"),
        (
            ["--out", "none", "--engine.offload", "optimizer", "--engine.zero_stage", "0"],
            2,
            "needs engine.zero_stage 1",
        ),
        (["--out", "none", "--data.test_shards", "missing"], 1, "there is no folder missing"),
        (["--out", "none", "--data.holdout", "4", "--evaluation.k", "5000"], 1, "asks for 5000 neighbours"),
    ],
)
def test_train__bad_input_is_one_line(folder: Path, flags: list[str], code: int, expected: str) -> None:
    done = train(folder, *flags)
    assert done.returncode == code
    assert expected in one_line(done.stderr)
    assert not (folder / "none").exists()


def test_train__weights_that_blow_up_end_the_run(folder: Path) -> None:
    flags = ["--out", "blown", "--engine.max_skipped", "2", "--optimizer.warmup", "0", "--checkpoint.every", "1"]
    done = train(folder, *flags, "--optimizer.base_lr", "1e30")
    assert done.returncode == 1
    assert "3 steps were skipped for a loss or gradient that is not finite" in one_line(done.stderr)
    rows = [json.loads(line) for line in (folder / "blown/skipped/rank_00000.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["keys"] and len(row["keys"]) == len(row["rows"]) == 8 for row in rows)
    weights = load_weights(folder / "blown/checkpoints/step_00000002")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_train__a_rank_that_hangs_is_named(folder: Path) -> None:
    flags = ["--out", "hung", "--steps", "100000", "--engine.timeout_minutes", "0.3", "--checkpoint.every", "0"]
    log, stderr = folder / "hung" / "metrics.jsonl", folder / "hung.log"
    with stderr.open("w") as file:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(PROGRAM), "tiny.yaml", *flags]
        launcher = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=file)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 4)
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True).stdout
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in found.split()}
    (hanging,) = (pid for pid, text in environments.items() if b"\0LOCAL_RANK=1\0" in text)
    os.kill(hanging, signal.SIGSTOP)
    try:
        wait_until(lambda: "another rank" in stderr.read_text())
    finally:
        os.kill(hanging, signal.SIGKILL)
    assert launcher.wait(60) == 1
    told = [line for line in stderr.read_text().splitlines() if line.startswith("train.py: ")][-2:]
    place = r"(in \w+|between the parts) of step \d+"  # rank 1's last word may be as old as a step of its start
    assert re.fullmatch(rf"train.py: no progress for \d+ s: rank 1 {place}, silent for \d+ s; rank 0 {place}", told[0])
    assert re.match(rf"train.py: rank 0: another rank has ended or hangs \(rank 1 {place}, silent for ", told[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_train__profile_on_request_changes_nothing(folder: Path, ranks: int) -> None:
    flags = ["--encoder.drop_path", "0"]
    out = folder / f"asked_{ranks}"
    out.mkdir()
    (out / "profile.request").touch()
    done = train(folder, "--out", out.name, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    (found,) = (out / "profile").iterdir()
    assert found.name == "step_00000011" and not (out / "profile.request").exists()
    assert {path.name for path in found.iterdir()} == {"profile.json", "profile.html", "trace.json"}
    profile = json.loads((found / "profile.json").read_text())
    assert {"labelling_teacher", "encoder backward", "data"} <= {part["name"] for part in profile["parts"]}
    assert len(profile["ranks"]) == ranks and "waits for data in" in profile["verdict"]
    if ranks == 1:
        still = train(folder, "--out", "unasked", *flags)
        assert still.returncode == 0 and losses_of(out) == losses_of(folder / "unasked")


def test_train__a_folder_holds_one_run_at_a_time(folder: Path) -> None:
    (folder / "held").mkdir()
    with (folder / "held" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = train(folder, "--out", "held")
    assert done.returncode == 1 and "another process is training in held" in one_line(done.stderr)
    assert train(folder, "--out", "held", "--steps", "2").returncode == 0


def wait_until(holds: Callable[[], bool], *, seconds: float = 90.0) -> None:
    """Waits until something holds; fails if it takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stages(folder: Path, *flags: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
    """Trains two stages by one command: MAE, then PL-MAE from its weights."""
    (folder / "first.yaml").write_text(CONFIG.replace("method:", "out: first\nmethod:\n  name: mae"))
    (folder / "second.yaml").write_text(CONFIG.replace("method:", "out: second\ninitial: {run: first}\nmethod:"))
    words = [str(PROGRAM), "first.yaml", "second.yaml", "--steps", "6", *flags]
    return warm_python.completed(warm_python.on_ranks(ranks, words, cwd=folder, env=ENVIRONMENT), timeout=120)


def test_train__stages_hand_their_weights_on(folder: Path) -> None:
    done = stages(folder)
    assert done.returncode == 0, done.stderr
    told = "starting from the student of first/checkpoints/step_00000006: encoder; drawn anew: "
    assert told + "class_head, data_head, decoder, reconstruction_head" in " ".join(done.stdout.split())
    ended = load_weights(folder / "first/checkpoints/step_00000006")
    start = folder / "start"
    alone = train(folder, "--initial.run", "first", "--out", str(start), "--steps", "1", "--optimizer.base_lr", "0")
    assert alone.returncode == 0, alone.stderr
    begun = load_weights(start / "checkpoints/step_00000001")
    teacher = load_weights(start / "checkpoints/step_00000001", "labelling_teacher")
    names = [name for name in begun if name.startswith("encoder.blocks.")]
    assert names and all(torch.allclose(begun[name], ended[name], atol=1e-6) for name in names)
    assert all(torch.allclose(teacher[name], ended[name], atol=1e-6) for name in names)
    again = stages(folder)
    assert again.returncode == 0 and again.stdout.splitlines() == ["first is complete", "second is complete"]


def test_train__stages_on_two_ranks_equal_one(folder: Path, tmp_path: Path) -> None:
    for name in ("tiny.yaml", "shards"):
        (tmp_path / name).symlink_to(folder / name)
    flags = ["--encoder.drop_path", "0", "--engine.zero_stage", "2"]
    for path, ranks in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        path.mkdir()
        (path / "shards").symlink_to(folder / "shards")
        done = stages(path, *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
    for stage in ("first", "second"):
        one, two = (
            [row["loss"] for row in rows_of(tmp_path / ranks / stage) if row["step"] > 1] for ranks in ("one", "two")
        )
        assert one == pytest.approx(two, rel=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--initial.run", "nowhere"], "nowhere holds no whole checkpoint"),
        (["--initial.run", "whole", "--initial.model", "nobody"], "holds no weights of 'nobody'"),
        (["--initial.file", "tiny.yaml"], "tiny.yaml is damaged"),
        (["--initial.file", "nothing.pth"], "there is no file nothing.pth"),
        (
            ["--initial.run", "whole", "--encoder.dim", "48"],
            "encoder.blocks.0.attn.proj.bias is [32] there and [48] here",
        ),
        (
            ["--initial.run", "whole", "--encoder.depth", "1"],
            "encoder.blocks.1.attn.proj.bias is [32] there and absent here",
        ),
        (
            ["--initial.run", "whole", "--encoder.depth", "3"],
            "encoder.blocks.2.attn.proj.bias is absent there and [32] here",
        ),
    ],
)
def test_train__initial_weights_that_do_not_fit(folder: Path, flags: list[str], message: str) -> None:
    done = train(folder, "--out", "misfit", *flags)
    assert done.returncode == 1 and message in one_line(done.stderr)
    assert not (folder / "misfit" / "checkpoints").exists()


def test_train__stages_that_share_a_folder_are_refused(folder: Path) -> None:
    done = stages(folder, "--out", "both")
    assert done.returncode == 2 and "out is both in more than one configuration" in one_line(done.stderr)


def test_train__schedules_reach_the_optimizer(folder: Path) -> None:
    """Prototypes stay while they are frozen, and a low layer moves less than a high one."""
    flags = ["--steps", "4", "--optimizer.freeze_prototypes", "4", "--optimizer.layer_decay", "0.1"]
    flags += ["--optimizer.weight_decay", "0", "--optimizer.warmup", "0"]
    for stage in ("0", "1", "3"):
        out = f"decayed_{stage}"
        done = train(folder, "--out", out, "--checkpoint.every", "1", "--checkpoint.keep", "9", *flags,
                     "--engine.zero_stage", stage)  # fmt: skip
        assert done.returncode == 0, done.stderr
        first, last = (load_weights(folder / out / f"checkpoints/step_0000000{step}") for step in (1, 4))
        assert torch.equal(first["class_head.prototypes"], last["class_head.prototypes"])
        moved = [
            float((last[name] - first[name]).abs().mean())
            for name in (
                "encoder.patch_embed.proj.weight",
                "encoder.blocks.1.mlp.fc1.weight",
                "class_head.mlp.0.weight",
            )
        ]
        assert moved[0] < 0.05 * moved[1] and moved[1] < 0.5 * moved[2] and moved[0] > 0
