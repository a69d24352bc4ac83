"""Which columns of a parquet file are the image and the label."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestri.shards.errors import ShardError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
"""What a column of images is called, best first."""
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label", "category", "class_label")
"""What a column of labels is called, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageColumns:
    """The columns of a file."""

    image: str
    is_struct: bool
    """The image is in a struct's field ``bytes``, as Hugging Face has it."""
    label: str
    """Empty where there is none."""
    class_names: tuple[str, ...]
    """From Hugging Face's metadata; empty where there is none."""

    @property
    def image_leaf(self) -> str:
        """The column as parquet counts them."""
        return f"{self.image}.bytes" if self.is_struct else self.image


def find_columns(schema: Any, path: Path, image: str = "", label: str = "") -> ImageColumns:
    """Returns the columns of an Arrow schema.

    Args:
        schema: a ``pyarrow.Schema``.
        path: the file, for the text of errors.
        image: the column of images, if it is known.
        label: the column of labels, if it is known.

    Raises:
        ShardError: there is none of images, several may be meant, or one is of an unusable type.
    """
    features = _features(schema.metadata)
    types = {field.name: field.type for field in schema}
    for name, option in ((image, "image"), (label, "label")):
        if name and name not in types:
            raise ShardError(f"{path} has no {option} column '{name}'; it has {', '.join(types)}")
        if name and schema.names.count(name) > 1:
            raise ShardError(f"{path} has {schema.names.count(name)} columns called '{name}'")
    image = image or _image_column(types, features, path)
    if not _is_binary(types[image]) and not _is_image_struct(types[image]):
        raise ShardError(
            f"{path}: column '{image}' is {_brief(types[image])}; images are binary, or a struct with bytes"
        )
    label = label or _label_column(types, features, path)
    if label and not _is_label(types[label]):
        raise ShardError(
            f"{path}: column '{label}' is {_brief(types[label])}; labels are integers, strings or lists of them"
        )
    return ImageColumns(
        image=image,
        is_struct=_is_image_struct(types[image]),
        label=label,
        class_names=_class_names(features.get(label), path) if label else (),
    )


def _image_column(types: Mapping[str, Any], features: Mapping[str, Any], path: Path) -> str:
    said = [name for name, feature in features.items() if _type_of(feature) == "Image" and name in types]
    structs = [name for name, kind in types.items() if _is_image_struct(kind)]
    binaries = [name for name, kind in types.items() if _is_binary(kind)]
    for candidates in (said, structs, binaries):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            named = [name for name in IMAGE_NAMES if name in candidates]
            if not named:
                hint = " or ".join(f"--image {name}" for name in candidates)
                raise ShardError(f"{path} has {len(candidates)} columns that may be images; say {hint}")
            return named[0]
    raise ShardError(f"{path} has no column of images (binary, or a struct with bytes); it has {', '.join(types)}")


def _label_column(types: Mapping[str, Any], features: Mapping[str, Any], path: Path) -> str:
    said = [name for name, feature in features.items() if _names_in(feature) is not None and name in types]
    if len(said) > 1 and "label" not in said and "labels" not in said:
        hint = " or ".join(f"--label {name}" for name in said)
        raise ShardError(f"{path} has {len(said)} columns that may be labels; say {hint}")
    candidates = said or [name for name, kind in types.items() if name in LABEL_NAMES and _is_label(kind)]
    return min(candidates, key=lambda name: (*LABEL_NAMES, name).index(name), default="")


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """Returns Hugging Face's description of the columns; empty where there is none that can be read."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _type_of(feature: Any) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _names_in(feature: Any) -> Any:
    """Returns the class names of a feature, or of what it is a list of; None where it is no class."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if _type_of(feature) in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    return feature.get("names") if _type_of(feature) == "ClassLabel" else None


def _class_names(feature: Any, path: Path) -> tuple[str, ...]:
    names = _names_in(feature)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ShardError(f"{path}: the class names in its metadata are no list of strings")
    return tuple(names)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_image_struct(kind: Any) -> bool:
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    position = kind.get_field_index("bytes")
    return position >= 0 and _is_binary(kind.field(position).type)


def _is_label(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(types.is_integer(kind) or is_text or types.is_null(kind))


def _brief(kind: Any) -> str:
    return str(kind)[:80]
