"""Whether a JPEG's pixels can all be decoded, found out by libjpeg-turbo.

A decode to grey at an eighth of the size reads every bit of every channel, as a full one does, and finds the same
damage; only the arithmetic behind it is saved.

libjpeg warns and goes on.  These warnings mean damage:

- ``premature end of data segment``, ``Premature end of JPEG file``: blocks are missing;
- ``bad Huffman code``, ``bad arithmetic code``, ``found marker … instead of RST…``, ``Inconsistent progression``;
- ``extraneous bytes before marker`` in the midst of the pixels, and before the end marker where they aren't padding:
  blocks broke, and the decoder got out of step.

These don't, and every viewer opens such files:

- up to 8 bytes of anything, or any number of one and the same, between the last block and the end marker;
- an unknown JFIF revision or Adobe transform, a broken ICC profile, bytes between the segments before the pixels;
- scan parameters of a baseline JPEG, which mean nothing there.

Nothing can be said of bits that changed into others that fit: in a JPEG without restart markers that is what most
single flipped bits do.
"""

import re

import simplejpeg

from maestri.shards.jpeg import JpegHeader

_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Neither a stuffed byte nor a restart marker nor filling."""
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_HEADER_WARNING = re.compile(r"JFIF revision|Adobe color transform|ICC marker|extraneous bytes before marker")
_DAMAGE = re.compile(r"corrupt|premature|inconsistent", re.IGNORECASE)
_MAX_JUNK = 8
"""Bytes before the end marker; where blocks broke, there are seldom as few."""
_MAX_WARNINGS = 4
MAX_SCANS = 500
"""Of a JPEG; encoders write about ten, and a file of a few kilobytes can keep a decoder busy for minutes."""
_SCAN = re.compile(rb"\xff\xda")


def find_damage(data: bytes, header: JpegHeader | None) -> str:
    """Returns what is damaged, empty if nothing is.

    Args:
        data: a JPEG with its end marker.
        header: its header; None for a JPEG of another kind, of which only what is certain is said.
    """
    checked = data
    for _ in range(_MAX_WARNINGS):
        problem = _decode(checked)
        if not problem:
            return _missing_scans(data, header) if header is not None and header.is_progressive else ""
        repaired = _without_harmless(checked, problem)
        if not repaired:
            break
        checked = repaired
    if header is None and not _DAMAGE.search(problem):
        return ""  # of a kind that libjpeg-turbo doesn't decode: others have to say
    return problem


def count_scans(data: bytes, header: JpegHeader | None) -> int:
    """Returns how many scans a JPEG has up to its end marker, or any number that is not above ``MAX_SCANS``.

    Args:
        data: of the file.
        header: its header; None for a JPEG of another kind.
    """
    if header is not None and not header.is_progressive and data[header.scan_at + 4] == len(header.channels):
        return 1  # libjpeg refuses another
    if sum(1 for _ in _SCAN.finditer(data)) <= MAX_SCANS:
        return 1
    scans, at = 0, 2
    while (match := _MARKER.search(data, at)) is not None and (marker := data[match.start() + 1]) != _END[1]:
        at = match.start() + 2
        if marker not in (0x01, 0xD8):
            scans += marker == 0xDA
            at += int.from_bytes(data[at : at + 2], "big")
    return scans


def _decode(data: bytes) -> str:
    """Returns the first thing that libjpeg warns of, empty for none."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return " ".join(str(error).split()) or "libjpeg-turbo fails"
    return ""


def _without_harmless(data: bytes, problem: str) -> bytes:
    """Returns a JPEG of the same pixels without the cause of a warning; empty where pixels are damaged."""
    if "Invalid SOS parameters" in problem:
        return _with_plain_scans(data)
    lean = _lean(data)
    if found := _BEFORE_END.search(problem):
        return _without_padding(lean, int(found[1]))
    return lean if _HEADER_WARNING.search(problem) and lean != data else b""


def _without_padding(lean: bytes, num_extraneous: int) -> bytes:
    """Returns the JPEG without what stands between its last block and its end marker; empty if that is no padding."""
    scan = lean.find(b"\xff\xda")
    end = lean.find(_END, scan)
    if scan < 0 or end < 0:
        return b""
    filler = lean[end - 1 : end]
    bare = lean[:end].rstrip(filler)
    for same in range(min(3, end - len(bare))):  # the last block may itself end with the filler
        whole = bare + filler * same + _END
        problem = _decode(whole)
        if not _BEFORE_END.search(problem) and "premature" not in problem.lower():
            return whole
    return lean[: end - num_extraneous] + _END if num_extraneous <= _MAX_JUNK else b""


def _lean(data: bytes) -> bytes:
    """Returns the JPEG without application data, comments and bytes that belong to no segment before its pixels."""
    parts, at = [data[:2]], 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 4:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            parts.append(data[at:])
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:
            at += 1 if marker == 0xFF else 2
            continue
        if marker != 0xFE and not 0xE0 <= marker <= 0xEF:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _with_plain_scans(data: bytes) -> bytes:
    """Returns a baseline JPEG whose scans say that they hold all coefficients."""
    plain = bytearray(data)
    for match in re.finditer(rb"\xff\xda\0[\x08\x0a\x0c]", data):
        after = match.start() + 2 + data[match.start() + 3]
        plain[after - 3 : after] = b"\x00\x3f\x00"
    return bytes(plain)


def _missing_scans(data: bytes, header: JpegHeader) -> str:
    """Returns a problem if a progressive JPEG lacks scans: decoders take it, and show it blurred."""
    missing_bits = {channel: [99] * 64 for channel in header.channels}
    at = header.scan_at
    while at + 4 <= len(data) and (marker := data[at + 1]) != _END[1]:
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            num_channels = data[at + 4] if at + 4 < len(data) else 0
            if length != 6 + 2 * num_channels or at + 2 + length > len(data):
                return f"no scan header at byte {at}"
            first, last, bits = data[at + length - 1], data[at + length], data[at + length + 1]
            for channel in data[at + 5 : at + 5 + 2 * num_channels : 2]:
                if channel in missing_bits:
                    missing_bits[channel][first : last + 1] = [bits & 15] * (min(last, 63) - first + 1)
        following = _MARKER.search(data, at + 2 + length)
        if following is None:
            break
        at = following.start()
    return "scans are missing" if any(map(any, missing_bits.values())) else ""
