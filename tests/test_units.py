"""Bytes and rates as people write them."""

import math
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantplan.units import gb_per_s, gib, mib, parse_bytes, parse_bytes_per_s

# Powers as the standards define them; a bare letter is binary, as on memory modules.
UNITS = {
    "B": 1,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "M": 1024**2,
    "G": 1024**3,
    "T": 1024**4,
}
NOT_AMOUNTS = [
    "",
    " ",
    "GiB",
    "-1GiB",
    "1,5GiB",
    "1.GiB",
    ".5GiB",
    "1e3",
    "5 XB",
    "1 Gi B",
    "24GiBs",
]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GiB", 25769803776), ("64 GB", 64000000000), ("512MiB", 536870912), ("1.5G", 1610612736)],
)
def test_documented_amounts(text: str, n_bytes: int) -> None:
    """The amounts of the documentation mean what it says."""
    assert parse_bytes(text) == n_bytes


@given(
    whole=st.integers(0, 10**6),
    decimals=st.integers(0, 999),
    unit=st.sampled_from(sorted(UNITS)),
    case=st.sampled_from([str, str.lower, str.upper]),
    space=st.sampled_from(["", " ", "\t"]),
)
@settings(deadline=None)
def test_amounts_are_exact(whole: int, decimals: int, unit: str, case: type, space: str) -> None:
    """An amount is its number times its unit, to the nearest byte, in any case and spacing."""
    text = f"{space}{whole}.{decimals:03d}{space}{case(unit)}{space}"
    exact = (whole + Fraction(decimals, 1000)) * UNITS[unit]
    # Half a byte for rounding; a double holds amounts of 1 EB to within 128 bytes.
    assert abs(parse_bytes(text) - exact) <= Fraction(1, 2) + exact / 2**51


@given(st.integers(0, 2**53))
@settings(deadline=None)
def test_plain_bytes_are_exact(n_bytes: int) -> None:
    """A number of bytes is that many."""
    assert parse_bytes(f"{n_bytes}B") == n_bytes


@pytest.mark.parametrize("text", ["2", " 40 ", "1.5"])
def test_an_amount_needs_its_unit(text: str) -> None:
    """A bare number is refused with how to write it, except for nothing."""
    with pytest.raises(ValueError, match=rf"'{text.strip()}' has no unit: write .*GiB"):
        parse_bytes(text)
    assert parse_bytes("0") == parse_bytes("0.0") == 0


@pytest.mark.parametrize("text", NOT_AMOUNTS)
def test_what_is_no_amount_is_refused(text: str) -> None:
    """A text that is no amount of memory is refused by name."""
    with pytest.raises(ValueError, match="is not an amount of memory"):
        parse_bytes(text)


@given(st.text(max_size=30) | st.from_regex(r"\s*[0-9.]+\s*[a-zA-Z/]*", fullmatch=True))
@example("9" * 400)
@example("9" * 5000 + "GiB/s")
@settings(deadline=None)
def test_any_text_is_an_amount_or_a_value_error(text: str) -> None:
    """Whatever is typed, the parsers answer with a number or a ValueError."""
    for parse in (parse_bytes, parse_bytes_per_s):
        with suppress(ValueError):
            assert 0 <= parse(text) < math.inf


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("80GB/s", 80e9),
        ("74.5 GiB/s", 74.5 * 2**30),
        (" 1.2 TB / s ", 1.2e12),
        ("936gb/S", 936e9),
        ("0B/s", 0.0),
    ],
)
def test_bandwidths(text: str, rate: float) -> None:
    """A bandwidth is an amount of memory per second."""
    assert parse_bytes_per_s(text) == rate


@pytest.mark.parametrize(
    "text", ["80GB", "80/s", "80GB/", "/s", "80GB/min", "s", "", "80/GB/s", "x/s"]
)
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    """A text that is no bandwidth is refused."""
    with pytest.raises(ValueError, match="is not a"):
        parse_bytes_per_s(text)


@given(st.integers(0, 2**50))
@settings(deadline=None)
def test_printed_amounts_read_back(n_bytes: int) -> None:
    """A printed amount reads back as the amount to within its last digit."""
    assert abs(parse_bytes(gib(n_bytes)) - n_bytes) <= 0.005 * 2**30 + 1
    assert abs(parse_bytes(mib(n_bytes)) - n_bytes) <= 0.005 * 2**20 + 1


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (gib(25769803776), "24.00 GiB"),
        (mib(15047065), "14.35 MiB"),
        (gb_per_s(936e9), "936 GB/s"),
        (gb_per_s(89.6e9), "89.6 GB/s"),
    ],
)
def test_amounts_are_printed_with_their_unit(printed: str, expected: str) -> None:
    """Amounts are printed in the unit that llama.cpp and vendors use."""
    assert printed == expected
