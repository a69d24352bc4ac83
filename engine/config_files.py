"""Reading a configuration from YAML and flags, and writing the resolved one beside the run."""

import contextlib
import dataclasses
import difflib
import functools
import io
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from maestri.engine.config import RunConfig, as_plain
from maestri.shards.files import write_atomically

Config = TypeVar("Config")
RECORDED_PACKAGES: tuple[str, ...] = ("maestri", "torch", "torchvision", "timm", "deepspeed", "numpy")
RECORDED_PACKAGES += ("nvidia-dali-cuda120", "nvidia-dali-cuda130")


def field_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Yields every ``section.field`` of a dataclass, sections themselves too; ``*`` stands for a name in a dict."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        path = prefix + item.name
        yield path
        kind = hints[item.name]
        if get_origin(kind) is dict:
            path, kind = f"{path}.*", get_args(kind)[1]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from field_paths(kind, f"{path}.")


def did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known name nearest to a wrong one, or an empty string."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if not close:
        leaves = {path.rpartition(".")[2]: path for path in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(wrong.rpartition(".")[2], leaves, n=1, cutoff=0.8)]
    return f"; did you mean '{close[0]}'?" if close else ""


def load_config(
    path: str | Path, arguments: Sequence[str] = (), *, settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """Returns a run's configuration from a YAML file, settings and flags; see ``load``."""
    return load(RunConfig, path, arguments, settings=settings)


def load(
    schema: type[Config], path: str | Path, arguments: Sequence[str] = (), *, settings: Mapping[str, Any] | None = None
) -> Config:
    """Returns the configuration: the schema's defaults, the YAML file over them, then settings, then flags.

    Args:
        schema: a dataclass.
        path: of the YAML file.
        arguments: ``--section.field VALUE`` flags.
        settings: values by ``section.field``, as a program gives them.

    Raises:
        ValueError: missing or unreadable file, unknown key or flag, wrong type or value; one line that names it.
        SystemExit: ``--help``, with code 0.
    """
    known = list(field_paths(schema))
    _check_flags(arguments, known)
    config = _read(Path(path), arguments, schema, known, settings or {})
    return _apply_flags(config, arguments) if arguments else config


def _read(
    path: Path, arguments: Sequence[str], schema: type[Config], known: Sequence[str], settings: Mapping[str, Any]
) -> Config:
    """Returns the defaults with file and settings over them; required fields may also be among the flags."""
    if not path.is_file():
        raise ValueError(f"there is no configuration {path}")
    try:
        given = [_nested(name, value) for name, value in settings.items()]
        defaults = _defaults(schema)  # type: ignore[arg-type]  # mypy takes a class of dataclasses for unhashable
        merged = OmegaConf.merge(defaults, OmegaConf.load(path), *given)
        for name in OmegaConf.missing_keys(merged):  # a whole section first, then the fields that it lacks
            if any(path.startswith(f"{name}.") for path in known):
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{name}={{}}"]))
        for name in sorted(OmegaConf.missing_keys(merged)):
            if f"--{name}" not in arguments[:-1]:
                raise ValueError(f"{name} is not set; write it there or give --{name} VALUE")
            value = arguments[arguments.index(f"--{name}") + 1]
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{name}={value}"]))
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]  # typed as Any container
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise ValueError(f"{path}: unknown key '{key}'{did_you_mean(key, known)}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key or 'configuration'}: {_first_line(error)}") from None
    except YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        if error.strerror:  # unreadable; OmegaConf raises a bare OSError where YAML holds a single value
            raise ValueError(f"{path}: {error.strerror}") from None
        raise ValueError(f"{path}: a configuration is a mapping of sections, as in configs/demo.yaml") from None
    except (TypeError, UnicodeDecodeError):
        raise ValueError(f"{path}: a configuration is a mapping of sections, as in configs/demo.yaml") from None
    except ValueError as error:  # a range check of the configuration itself
        raise ValueError(f"{path}: {_first_line(error)}") from None
    return config


@functools.cache
def _defaults(schema: type) -> Any:
    """Returns a schema's defaults and types, to merge others over; made once, which takes as long as all the rest."""
    return OmegaConf.structured(schema)


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Returns ``{"section": {"field": value}}`` of ``section.field``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_flags(arguments: Sequence[str], known: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name != "help" and name not in known:
            flags = [f"--{path}" for path in known]
            raise ValueError(f"unknown flag '{argument}'{did_you_mean(f'--{name}', flags)}")


def _apply_flags(config: Config, arguments: Sequence[str]) -> Config:
    """Returns ``config`` with flags applied; tyro's framed messages become one line."""
    if {"--help", "-h"} & set(arguments):
        return tyro.cli(type(config), default=config, args=arguments, config=(tyro.conf.FlagConversionOff,))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(type(config), default=config, args=arguments, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        raise ValueError(_unframed(said.getvalue())) from None


def _unframed(text: str) -> str:
    """Returns the message inside one of tyro's frames (title, rule, message, rule, hints) as one line."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        content = line.strip(" │|╭╮╰╯+")
        if content and not content.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(content)
    message = " ".join(parts[1] if len(parts) > 1 else parts[0]).strip()
    return message or "flags could not be read"


def commit_of(folder: Path) -> str:
    """Returns the git commit of a checkout, with ``+changes`` if files differ from it; empty outside of git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def save_config(config: RunConfig, out: Path) -> None:
    """Writes ``out/config.yaml``: the resolved configuration, headed by commit and versions as comments."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    header = [f"# commit: {commit_of(Path(__file__).resolve().parent) or 'unknown'}"]
    header += [f"# {name}: {version}" for name, version in versions.items()]
    body = OmegaConf.to_yaml(OmegaConf.create(as_plain(config)))
    write_atomically(out / "config.yaml", ("\n".join(header) + "\n" + body).encode())


def read_config(run: Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration a run was started with, flags over it; raises ValueError if ``run`` is not a run."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run: it has no config.yaml")
    return load_config(run / "config.yaml", arguments)
