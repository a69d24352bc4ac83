"""``maestri eval`` as a user runs it."""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import warm_python
from safetensors.torch import save_file

Maestri = Callable[..., tuple[int, str, str]]
FAST = (
    "--epochs",
    "2",
    "--runs",
    "2",
    "--shots",
    "1",
    "2",
    "--percent",
    "0",
    "--strengths",
    "1",
    "100",
    "--splits",
    "2",
)
PROGRAM = Path(__file__).with_name("ranks_program.py")
MODELS = {"student", "labelling_teacher", "reconstruction_teacher", "raw_pixels", "random_init"}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def results(folder: Path) -> dict[str, dict[str, object]]:
    """Returns what each protocol wrote, by protocol."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def by_two_ranks(run: Path) -> "subprocess.CompletedProcess[str]":
    """A job that fails on rank 1, then all protocols on two ranks: results in RUN/two, features where one looks."""
    words = [str(PROGRAM), "all", str(run), *FAST, "--out", str(run / "two")]
    return warm_python.completed(warm_python.on_ranks(2, words, env=ENVIRONMENT), timeout=400)


def test_all__two_ranks_find_what_one_finds(
    run: Path, by_two_ranks: "subprocess.CompletedProcess[str]", maestri: Maestri
) -> None:
    assert by_two_ranks.returncode == 0, by_two_ranks.stderr
    assert by_two_ranks.stdout.count("both ranks heard of it") == 2
    assert by_two_ranks.stdout.count("k-NN top-1") == 1, "rank 0 alone prints"
    assert max(map(len, by_two_ranks.stdout.splitlines())) <= 80 and "…" not in by_two_ranks.stdout
    assert maestri("all", run, *FAST, "--no-cache")[0] == 0
    two, one = results(run / "two"), results(run / "evaluation")
    assert set(one) == {"knn", "linear", "lowshot", "cluster"}
    assert two == one
    assert set(one["linear"]["top1"]) == MODELS
    assert set(one["knn"]["all"]["test"]["student"]["mean"]) == {"5", "10"}
    assert (run / "evaluation" / "cluster.md").read_text().startswith("## k-means")


def test_knn__features_come_from_the_cache(
    run: Path, by_two_ranks: object, maestri: Maestri, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO):
        code, out, _ = maestri("knn", run, "--k", 3, "--json", "--out", tmp_path)
    assert code == 0 and "computing" not in caplog.text
    assert caplog.text.count("come from") == 2, "training and test images"
    assert out == (tmp_path / "knn.json").read_text()
    assert json.loads(out)["images"] == {"train": 240, "held-out": 60, "test": 100}


def test_knn__one_checkpoint_of_a_run(run: Path, by_two_ranks: object, maestri: Maestri) -> None:
    assert maestri("knn", run / "checkpoints" / "step_00000007")[0] == 0
    written = results(run / "evaluation" / "step_00000007")
    assert written["knn"]["checkpoint"] == "step_00000007"


def test_knn__weights_of_a_timm_model(folder: Path, maestri: Maestri, tmp_path: Path) -> None:
    # With a classifier, as trained weights have; the model that is judged has none.
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "vit.safetensors")
    weights = ("knn", tmp_path / "vit.safetensors", folder / "train", "--timm", "test_vit", "--size", 32)
    code, out, err = maestri(*weights, "--test-shards", folder / "test", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["images"]["held-out"] == 30, "a tenth of the training images"
    assert set(found["top1"]) == {"test_vit", "raw_pixels", "random_init"}
    assert set(found["all"]["test"]["test_vit"]) == {"cls", "mean"}
    assert (tmp_path / "vit_judged" / "evaluation" / "knn.md").is_file()


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no source": (("knn", "nowhere"), "nowhere is not there"),
    "no run": (("knn", "{folder}"), "is neither a run"),
    "no timm": (("knn", "{folder}/recipe.yaml"), "say of which timm model"),
    "timm's name": (("knn", "{folder}/recipe.yaml", "--timm", "test_vitt"), "did you mean 'test_vit"),
    "no tokens": (("knn", "{folder}/recipe.yaml", "--timm", "resnet18"), "no vision transformer"),
    "not weights": (("knn", "{folder}/recipe.yaml", "--timm", "test_vit"), "recipe.yaml is damaged"),
    "folder for timm": (("knn", "{run}", "--timm", "test_vit"), "go with a file of weights"),
    "other weights": (("knn", "{student}", "--timm", "test_vit"), "the first is cls_token: absent in the file"),
    "no images": (("knn", "{timm}", "--timm", "test_vit"), "give training shards"),
    "large holdout": (("knn", "{run}", "--holdout", "300"), "holdout is 300, but"),
    "large k": (("knn", "{run}", "--k", "241"), "k asks for 241 neighbours, but there are only 240"),
    "few shots": (("lowshot", "{run}", "--shots", "30"), "shots asks for 30 images of each class, but class 'digit_"),
    "few to cluster": (("cluster", "{run}", "--holdout", "5"), "5 held-out images are too few for 10 clusters"),
    "other classes": (("linear", "{run}", "--test-shards", "{folder}/nine"), "has 10 classes, but"),
    "list": (("lowshot", "{run}", "--lists", "{list}"), "1 of 2 lines of {list} are no sample; the first: line 2"),
    "no list": (("lowshot", "{run}", "--lists", "absent.txt"), "--lists absent.txt cannot be read"),
    "epochs": (("linear", "{run}", "--epochs", "0"), "epochs is 0"),
    "two sets": (("knn", "{run}", "a", "--shards", "b"), "give one of them"),
    "nothing to classify": (("knn", "{bare}", "--holdout", "0"), "nothing to classify"),
    "torn": (("knn", "{torn}"), "student.safetensors"),
    "other architecture": (("knn", "{wide}"), "the first is cls_token: [1, 1, 32] in the file, [1, 1, 64]"),
}


@pytest.fixture(scope="module")
def places(folder: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the bad input is made of, by name."""
    made = tmp_path_factory.mktemp("bad")
    for name in ("torn", "wide", "bare"):
        shutil.copytree(run, made / name, ignore=shutil.ignore_patterns("features", "evaluation", "two"))
    weights = made / "torn" / "checkpoints" / "step_00000007" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = (run / "config.yaml").read_text()
    (made / "wide" / "config.yaml").write_text(config.replace("  patch: 8\n  dim: 32", "  patch: 8\n  dim: 64"))
    (made / "bare" / "config.yaml").write_text(config.replace(f"test_shards: {folder / 'test'}", "test_shards: ''"))
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), made / "timm.safetensors")
    first = min(path.name for path in (folder / "images" / "train").rglob("*.png"))
    (made / "list.txt").write_text(f"{first}\nn01440764_10026.JPEG\n")
    student = run / "checkpoints" / "step_00000007" / "student.safetensors"
    paths = {
        "folder": folder,
        "run": run,
        "student": student,
        "list": made / "list.txt",
        "timm": made / "timm.safetensors",
    }
    return {
        name: str(path) for name, path in (paths | {name: made / name for name in ("torn", "wide", "bare")}).items()
    }


@pytest.mark.parametrize("name", BAD)
def test_run__bad_input_is_one_line(name: str, places: dict[str, str], maestri: Maestri, tmp_path: Path) -> None:
    arguments, expected = BAD[name]
    written = (*(argument.format(**places) for argument in arguments), "--out", tmp_path / "out")
    code, out, err = maestri(*written, "--features", tmp_path / "features")
    assert (code, out) == (1, "")
    assert err.startswith("maestri eval: ") and err.count("\n") == 1
    assert expected.format(**places) in err
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_run__missing_labels(folder: Path, run: Path, maestri: Maestri, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text()) | {"labels": "none", "class_names": []}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = maestri("knn", run, tmp_path / "train", "--no-cache")
    assert code == 1 and "needs labels" in err
