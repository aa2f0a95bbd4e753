"""Messages: to the bit and back; whatever else arrives is refused with one message."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_ray.remote.wire import WireError, pack, unpack

ARRAYS = {
    "a": np.array([[1.5, -np.inf, np.nan], [0.0, -0.0, 1e-42]], dtype=np.float32),
    "b": np.arange(5, dtype=np.int64), "none": np.zeros((0, 4), dtype=np.uint16),
    "flags": np.array([True, False]), "bytes": np.arange(3, dtype=np.uint8),
}  # fmt: skip


def test_arrays_come_back_to_the_bit():
    found = unpack(pack({"n": 3, "words": "ü"}, ARRAYS))
    assert found.meta == {"n": 3, "words": "ü"} and found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


def test_big_endian_is_turned():
    (found,) = unpack(pack({}, {"a": np.array([1.0, 2.0], dtype=">f4")})).arrays.values()
    assert found.dtype.str == "<f4" and found.tolist() == [1.0, 2.0]


def test_objects_and_other_types_are_not_sent():
    for array in (np.array([object()]), np.array([1.0]), np.array(["text"])):
        with pytest.raises(ValueError, match="are not sent"):
            pack({}, {"a": array})


def head(text):
    raw = text.encode()
    return b"KATT" + len(raw).to_bytes(4, "little") + raw


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no message"),
        (b"PK\x03\x04 a zip file", "no message"),
        (b"KATT\xff\xff\xff\xff", "the limit does not hold"),
        (head("{"), "not JSON"),
        (head("[" * 100_000), "not JSON"),
        (head("[1]"), "of version None"),
        (head('{"version": 2}'), "of version 2"),
        (head('{"version": 1, "meta": {}}'), "does not list"),
        (head('{"version": 1, "meta": [], "arrays": []}'), "no plain data"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "|O", [1]]]}'), "cannot be one"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "<f4", [-1]]]}'), "cannot be one"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "<f4", [true]]]}'), "cannot be one"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "<f4", [999999999999, 999999999999]]]}'), "ends within"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "<f4", [2]]]}') + b"1234", "ends within"),
        (head('{"version": 1, "meta": {}, "arrays": []}') + b"1", "after its arrays"),
        (head('{"version": 1, "meta": {}, "arrays": [["a", "|u1", [0]], ["a", "|u1", [0]]]}'), "given twice"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(body, words):
    with pytest.raises(WireError, match=words):
        unpack(body)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damage_is_refused_or_harmless(noise, at, byte):
    """Never anything but a message or a `WireError`."""
    body = bytearray(pack({"n": 1}, ARRAYS))
    body[at % len(body)] = byte
    for damaged in (bytes(body), bytes(body[:at]), bytes(body) + noise, noise, b"KATT" + noise):
        try:
            unpack(damaged)
        except WireError:
            continue
