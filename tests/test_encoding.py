import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bgray import encoding

ROLLS = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 88), st.integers(1, 50)), elements=st.integers(0, 1)
)


@settings(max_examples=50, deadline=None)
@given(ROLLS)
def test_a_roll_decodes_to_itself_as_int16(roll):
    found = encoding.decode_roll(encoding.encode_roll(roll))
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, roll)


def test_a_piece_of_music_takes_a_hundredth_of_a_byte_per_cell():
    roll = np.zeros((88, 1920), np.uint8)
    for step in range(0, 1920, 12):  # an eighth of a chord
        roll[np.random.default_rng(step).integers(20, 60, 3), step : step + 11] = 1
    assert len(encoding.encode_roll(roll)) < 0.01 * roll.size


@settings(max_examples=50, deadline=None)
@given(st.integers(10, 200), st.integers(0, 255))
def test_a_roll_with_a_changed_byte_is_corrupt_or_the_same(place, byte):
    roll = (np.random.default_rng(0).random((88, 200)) < 0.1).astype(np.uint8)
    data = bytearray(encoding.encode_roll(roll))
    data[place] = byte
    try:
        found = encoding.decode_roll(bytes(data))
    except encoding.Corrupt:
        return
    np.testing.assert_array_equal(found, roll)


@pytest.mark.parametrize("data", [b"", b"ROLL", b"ROLL" + bytes(6), b"fLaC and more"])
def test_bytes_that_are_no_voice_are_corrupt(data):
    with pytest.raises(encoding.Corrupt, match="no piano roll"):
        encoding.decode_roll(data)
    with pytest.raises(encoding.Corrupt, match=r"Format not recognised|Error"):
        encoding.decode_flac(data)
