import pytest

from maestri.shards.byte_size import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1234", 1234),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("1.5G", 15 * 10**8),
        ("256MiB", 2**28),
        ("7B", 7),
    ],
)
def test_parse_bytes__as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5", "1TB", "1,000", "0x10", "1e9"])
def test_parse_bytes__refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; expected bytes"):
        parse_bytes(text)
