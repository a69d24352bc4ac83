"""Some images of a set on one sheet, each with its label."""

import contextlib
import io
import math
import unicodedata

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maestri.shards.errors import ShardError
from maestri.shards.images import FORMATS, MAX_PIXELS
from maestri.shards.plan import shuffled
from maestri.shards.shard_set import ShardSet

TILE = 160
"""Pixels of a tile's side."""
GAP = 8
"""Pixels between tiles."""
TEXT = 16
"""Pixels of a line of text."""
_FONT_SIZE = 12
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
_PAPER, _INK, _FAINT = "white", "black", (225, 225, 225)


def rows_for(shard_set: ShardSet, *, count: int, seed: int, class_name: str = "") -> NDArray[np.int64]:
    """Returns rows to show, in the set's order: random ones, of one class or of all.

    Raises:
        ShardError: there is no such class, or it has no images.
    """
    rows = np.arange(len(shard_set), dtype=np.int64)
    if class_name:
        names = shard_set.manifest.class_names
        if class_name not in names:
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise ShardError(f"there is no class '{class_name}'; there are {len(names)}: {some or 'none'}")
        rows = _rows_of(shard_set, names.index(class_name))
        if not len(rows):
            raise ShardError(f"class '{class_name}' has no images")
    return np.sort(rows[shuffled(len(rows), seed)[:count]])


def sheet(shard_set: ShardSet, rows: NDArray[np.int64]) -> Image.Image:
    """Returns a picture with the rows' images, upright and whole, and under each its labels, or its key."""
    columns = max(1, math.ceil(math.sqrt(len(rows))))
    lines = math.ceil(len(rows) / columns)
    step = (TILE + GAP, TILE + TEXT + GAP)
    paper = Image.new("RGB", (GAP + columns * step[0], GAP + lines * step[1]), _PAPER)
    draw = ImageDraw.Draw(paper)
    font, has_all_letters = _font()
    for at, row in enumerate(rows.tolist()):
        left, top = GAP + at % columns * step[0], GAP + at // columns * step[1]
        tile = _tile(shard_set, row)
        draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=_FAINT)
        paper.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        caption = _caption(shard_set, row)
        text = ellipsised(caption if has_all_letters else in_ascii(caption), TILE, font)
        draw.text((left + TILE / 2, top + TILE + 2), text, _INK, font, anchor="ma")
    return paper


def ellipsised(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns the text, or as much of its start and end as fits into ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    for left in range(len(text) - 1, 1, -1):
        shorter = f"{text[: (left + 1) // 2]}...{text[len(text) - left // 2 :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "..."


def in_ascii(text: str) -> str:
    """Returns the text without accents, and with ``?`` for letters of other scripts."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return plain.encode("ascii", "replace").decode()


def _font() -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, bool]:
    """Returns a font of this machine's with many letters, or Pillow's own, which knows only ASCII."""
    for name in _FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, _FONT_SIZE), True
    return ImageFont.load_default(_FONT_SIZE), False


def _tile(shard_set: ShardSet, row: int) -> Image.Image:
    """Returns an image in a tile's size; small ones are enlarged by whole factors, so that their pixels show."""
    with Image.open(io.BytesIO(shard_set.read_checked(np.array([row]))[0]), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ShardError(f"{shard_set.key(row)} has {image.width} × {image.height} pixels, which is no sane size")
        image.draft("RGB", (2 * TILE, 2 * TILE))
        pixels = image.convert("RGB")
    pixels = _upright(pixels, int(shard_set.columns.orientation[row]))
    if max(pixels.size) * 2 <= TILE:
        factor = TILE // max(pixels.size)
        return pixels.resize((pixels.width * factor, pixels.height * factor), Image.Resampling.NEAREST)
    scale = TILE / max(pixels.size)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    return pixels.resize(size, Image.Resampling.LANCZOS)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def _caption(shard_set: ShardSet, row: int) -> str:
    labels = shard_set.labels_of(row)
    names = ", ".join(shard_set.manifest.class_names[label] for label in labels)
    text = names or (shard_set.key(row) if not shard_set.manifest.class_names else "no label")
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _rows_of(shard_set: ShardSet, label: int) -> NDArray[np.int64]:
    columns = shard_set.columns
    if columns.label_end is None or columns.label_values is None:
        return np.flatnonzero(columns.label == label).astype(np.int64)
    at = np.flatnonzero(columns.label_values == label)
    return np.unique(np.searchsorted(columns.label_end, at, side="right")).astype(np.int64)
