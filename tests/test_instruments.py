import pytest

from bgray import band
from bgray.instruments import NAMES, column


def test_the_names_are_those_of_the_built_in_band():
    for program, name in band.PROGRAMS.items():
        assert column(program) == name


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (4, "electric_piano_1"),
        (24, "acoustic_guitar_nylon"),
        (25, "acoustic_guitar_steel"),
        (52, "choir_aahs"),
        (56, "trumpet"),
        (73, "flute"),
        (80, "lead_1_square"),
        (127, "gunshot"),
    ],
)
def test_other_programs_have_their_general_midi_name(program, name):
    assert column(program) == name


def test_every_program_has_a_column_of_its_own():
    columns = [column(program) for program in range(-1, 128)]
    assert len(NAMES) == 128
    assert len(set(columns)) == 129
    assert not {"audio", "roll", "key", "mixture"} & set(columns)


def test_a_stem_called_by_name_keeps_it():
    assert column("vocals") == "vocals"


@pytest.mark.parametrize("program", [-2, 128])
def test_a_number_that_is_no_program_is_named(program):
    with pytest.raises(ValueError, match=f"instrument {program}: programs are 0 to 127"):
        column(program)
