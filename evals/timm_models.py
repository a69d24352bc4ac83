"""Vision transformers of timm, judged as ours are."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestri.engine.weights_file import read_weights
from maestri.evals.features import Extractor
from maestri.evals.weights import load_strictly


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmModel:
    """A model without classifier, and the images it wants."""

    module: Any
    """The ``nn.Module``; timm declares few of its attributes."""
    mean: tuple[float, ...]
    """Of pixels, red, green and blue, where white is 1."""
    std: tuple[float, ...]
    """Their standard deviation."""
    size: int
    """Height and width of images in pixels."""


def build_timm(name: str, size: int = 0) -> TimmModel:
    """Returns a timm vision transformer with weights drawn from seed 0.

    Args:
        name: timm's.
        size: height and width of images in pixels; 0 = the model's own.

    Raises:
        ValueError: timm has no such model, or it gives no tokens, or takes no images of this size.
    """
    import timm

    known = timm.list_models()
    if name.split(".")[0] not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    wanted: dict[str, Any] = {"img_size": size} if size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module: Any = timm.create_model(name, pretrained=False, num_classes=0, **wanted)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"timm cannot make {name}{f' for --size {size}' if size else ''}: {reason}") from None
    if not hasattr(module, "num_prefix_tokens"):
        raise ValueError(f"timm's {name} is no vision transformer: it gives no tokens")
    settings = module.pretrained_cfg
    size = size or int(settings["input_size"][-1])
    patch = max(module.patch_embed.patch_size)
    if size % patch:
        raise ValueError(f"--size is {size}; it must be a multiple of {name}'s patch ({patch})")
    return TimmModel(module=module, mean=tuple(settings["mean"]), std=tuple(settings["std"]), size=size)


def load_timm(model: TimmModel, path: Path) -> None:
    """Loads a file of weights into a model, strictly; those of a classifier, which the model has not, are left out.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    weights = read_weights(path)
    classifier = model.module.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    own = model.module.state_dict().keys()
    fitting = {name: value for name, value in weights.items() if name in own or not name.startswith(heads)}
    load_strictly(model.module, fitting, str(path))


def timm_extractor(model: TimmModel) -> Extractor:
    """Returns features of a model after its last norm: ``mean`` of patch tokens, ``cls`` if it has a class token."""
    module: nn.Module = model.module
    scale = 1 / (255 * torch.tensor(model.std))[:, None, None]
    shift = -(torch.tensor(model.mean) / torch.tensor(model.std))[:, None, None]
    has_class_token = getattr(module, "cls_token", None) is not None
    # Models that average their tokens have their last norm behind the average.
    norm = model.module.fc_norm if isinstance(getattr(module, "fc_norm", None), nn.Module) else nn.Identity()

    def extract(images: Tensor) -> dict[str, Tensor]:
        pixels = torch.addcmul(shift.to(images.device), images.float(), scale.to(images.device))
        tokens = model.module.forward_features(pixels)
        found = {"cls": tokens[:, 0]} if has_class_token else {}
        found["mean"] = tokens[:, model.module.num_prefix_tokens :].mean(dim=1)
        return {pooling: norm(values) for pooling, values in found.items()}

    return extract
