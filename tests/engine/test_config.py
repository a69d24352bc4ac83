"""Configuration: YAML and flags over defaults, and one line for what is wrong."""

from pathlib import Path

import pytest

from maestri.engine.config import Changes, RunConfig, as_plain, changes_between
from maestri.engine.config_files import load_config, read_config, save_config

TEXT = "out: run\ndata: {shards: there}\noptimizer: {base_lr: 1e-3}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def line_of(path: Path, text: str = TEXT, *flags: str) -> str:
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path, flags)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_load_config__file_over_defaults_and_flags_over_file(path: Path) -> None:
    config = load_config(path, ["--views.scale", "0.1", "0.9", "--steps", "7", "--logging.tensorboard", "False"])
    assert config.optimizer.base_lr == 1e-3
    assert config.views.scale == (0.1, 0.9)
    assert config.steps == 7 and not config.logging.tensorboard
    assert config.encoder.depth == 12


def test_load_config__required_field_may_be_a_flag(path: Path) -> None:
    path.write_text("out: run\n")
    assert load_config(path, ["--data.shards", "here"]).data.shards == "here"
    assert "data.shards is not set" in line_of(path, "out: run\n")


def test_load_config__unknown_key_says_which_was_meant(path: Path) -> None:
    line = line_of(path, TEXT + "encoder: {dept: 3}\n")
    assert line == f"{path}: unknown key 'encoder.dept'; did you mean 'encoder.depth'?"
    assert "did you mean 'engine.zero_stage'?" in line_of(path, TEXT + "zero_stage: 3\n")


def test_load_config__unknown_flag_says_which_was_meant(path: Path) -> None:
    expected = "unknown flag '--encoder.dept'; did you mean '--encoder.depth'?"
    assert line_of(path, TEXT, "--encoder.dept", "3") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("encoder: {depth: many}", "encoder.depth: Value 'many' of type 'str' could not be converted to Integer"),
        ("engine: {precision: fp8}", "engine.precision: Invalid value 'fp8', expected one of ['bf16', 'fp32']"),
        ("encoder: 3", "configuration: Merge error"),
        ("encoder: {depth: 0}", "encoder.depth is 0; it must be at least 1"),
        ("views: {size: 225}", "views.size is 225; it must be a multiple of encoder.patch (16)"),
        ("batch: {global_size: 9, accumulation: 2}", "batch.global_size is 9; it must be a multiple of"),
        ("steps: [", "not YAML"),
    ],
)
def test_load_config__wrong_values_name_the_field(path: Path, text: str, expected: str) -> None:
    assert expected in line_of(path, TEXT + text + "\n")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--encoder.depth", "many"), "Error parsing --encoder.depth: invalid literal for int() with base 10: 'many'"),
        (("--encoder.depth", "0"), "encoder.depth is 0; it must be at least 1"),
        (("--views.scale", "0.1"), "Missing value for argument '--views.scale'. Expected 2 values."),
        (("steps=3",), "Unrecognized options: steps=3"),
    ],
)
def test_load_config__wrong_flags_name_the_field(path: Path, flags: tuple[str, ...], expected: str) -> None:
    assert expected in line_of(path, TEXT, *flags)


def test_load_config__missing_file_or_no_mapping(path: Path) -> None:
    assert "a configuration is a mapping of sections" in line_of(path, "- 1\n")
    with pytest.raises(ValueError, match="there is no configuration"):
        load_config(path.with_name("other.yaml"))


def test_save_config__is_read_back_equal_and_names_commit_and_versions(path: Path) -> None:
    config = load_config(path, ["--views.ratio", "0.5", "2"])
    save_config(config, path.parent)
    assert read_config(path.parent) == config
    header = (path.parent / "config.yaml").read_text()
    assert "# commit: " in header and "# torch: " in header and "# deepspeed: " in header


def test_read_config__needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        read_config(tmp_path)


def test_changes_between__names_what_matters_and_what_does_not(path: Path) -> None:
    old = as_plain(load_config(path))
    flags = ["--encoder.depth", "3", "--out", "else", "--checkpoint.keep", "9", "--engine.zero_stage", "3"]
    changes = changes_between(old, as_plain(load_config(path, flags)))
    assert changes.refused == ["encoder.depth (12 → 3)"]
    assert changes.allowed == ["checkpoint.keep (2 → 9)", "engine.zero_stage (1 → 3)"]
    assert changes_between(old, old) == Changes(refused=[], allowed=[])


def test_may_change__names_fields_that_exist(path: Path) -> None:
    from maestri.engine.config import MAY_CHANGE
    from maestri.engine.config_files import field_paths

    assert set(MAY_CHANGE) <= set(field_paths(RunConfig))
