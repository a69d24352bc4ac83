"""Where metrics are shown besides the run's own log: TensorBoard, Weights & Biases."""

import importlib
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from maestri.engine.config import LoggingConfig
from maestri.engine.errors import RunError
from maestri.shards.files import write_atomically


class Board(Protocol):
    """Takes the rows of a run's log."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Shows a row."""
        ...

    def sync(self) -> None:
        """Sends what is kept back."""
        ...

    def close(self) -> None:
        """Ends files, threads and connections."""
        ...


def open_boards(settings: LoggingConfig, out: Path, *, first_step: int, config: Mapping[str, Any]) -> list[Board]:
    """Returns the boards that the settings ask for.

    Args:
        out: the run's folder.
        first_step: optimizer steps done; what was shown of later ones is replaced where a board can.
        config: the run's whole configuration, for boards that show it.

    Raises:
        RunError: a board's package is missing, or its server refuses.
    """
    boards: list[Board] = []
    if settings.tensorboard:
        boards.append(TensorBoard(out / "tensorboard", first_step=first_step))
    if settings.wandb:
        boards.append(WeightsAndBiases(settings.wandb, out, config=config))
    return boards


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorBoard's own imports warn
            from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Writes events to their file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file and its thread."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, which goes on under the same id, kept in ``wandb_id``, when the run is resumed."""

    def __init__(self, project: str, out: Path, *, config: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise RunError(
                f"logging.wandb is {project}, but the package wandb is not installed: pip install wandb"
            ) from None
        identity = out / "wandb_id"
        if not identity.is_file():
            write_atomically(identity, f"{secrets.token_hex(8)}\n".encode())
        try:
            self._run: Any = wandb.init(
                project=project,
                id=identity.read_text(encoding="utf-8").strip(),
                name=out.name,
                dir=str(out),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise RunError(f"logging.wandb: {error}; WANDB_MODE=offline keeps it in {out / 'wandb'}") from None
        # Its own counter cannot go back, which a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends a row."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def sync(self) -> None:
        """Does nothing: rows are sent as they come."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()
