"""Weights of another run as the start of this one."""

from pathlib import Path

from maestri.engine.checkpoint import latest, load_state, load_weights
from maestri.engine.config import InitialConfig
from maestri.engine.errors import CheckpointError
from maestri.engine.weights_file import load_encoder, read_weights
from maestri.model.encoder import Encoder
from maestri.model.method import Method

ENCODER = "encoder."


def load_initial(method: Method, config: InitialConfig) -> str:
    """Copies the encoder, and what else the method inherits, into its student; returns a sentence that says so.

    Call it before the engine is started: teachers start from the student.

    Raises:
        CheckpointError: there is no checkpoint, the encoder differs, or something that the method needs is missing.
    """
    if config.file:
        _refuse(method, {ENCODER}, "initial.file has an encoder alone")
        weights = read_weights(Path(config.file), model=config.model)
        encoder = method.student.get_submodule("encoder")
        assert isinstance(encoder, Encoder)
        return load_encoder(encoder, weights, where=config.file)
    if not config.run:
        _refuse(method, set(), "initial.run is empty")
        return ""
    folder = Path(config.run)
    checkpoint = folder if (folder / "run.json").is_file() else latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"initial.run: {folder} holds no whole checkpoint; train it first")
    prefixes = tuple(dict.fromkeys((ENCODER, *method.inherits)))
    theirs, own = (
        {name: value for name, value in state.items() if name.startswith(prefixes)}
        for state in (load_weights(checkpoint, config.model), method.student.state_dict())
    )
    for name in sorted(theirs.keys() | own.keys()):
        there, here = (list(state[name].shape) if name in state else "absent" for state in (theirs, own))
        if there != here:
            raise CheckpointError(
                f"initial.run: the {config.model} of {checkpoint} does not fit: {name} is {there} there and {here} here"
            )
    method.student.load_state_dict(theirs, strict=False)
    kept = _inherit_state(method, checkpoint, prefixes)
    parts = dict.fromkeys(name.split(".")[0] for name in method.student.state_dict())
    taken = [part for part in parts if f"{part}.".startswith(prefixes)]
    drawn = [part for part in parts if part not in taken]
    return f"starting from the {config.model} of {checkpoint}: {', '.join(taken + kept)}" + (
        f"; drawn anew: {', '.join(drawn)}" if drawn else ""
    )


def _inherit_state(method: Method, checkpoint: Path, prefixes: tuple[str, ...]) -> list[str]:
    """Copies the parts of the method's state that it inherits, where they have the same shape; returns their names."""
    own = method.state.state_dict()
    wanted = [name for name in own if name.startswith(prefixes)]
    if not wanted:
        return []
    theirs = load_state(checkpoint)
    fitting = [name for name in wanted if name in theirs and theirs[name].shape == own[name].shape]
    if fitting != wanted:
        return []
    method.state.load_state_dict(own | {name: theirs[name] for name in fitting})
    return list(dict.fromkeys(name.split(".")[0] for name in fitting))


def _refuse(method: Method, given: set[str], why: str) -> None:
    missing = [prefix.rstrip(".") for prefix in method.inherits if prefix not in given]
    if missing:
        raise CheckpointError(f"{why}, but the method continues a run: it needs its {' and '.join(missing)}")
