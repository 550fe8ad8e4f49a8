import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgray import notes
from bgray.config import ConfigError
from bgray.notes import cell, note_cell, sealed, table

HEADS = ["variant", "val_stft", "ear notes", "id"]


def report(*rows, heads=HEADS):
    """rows: (label, score, note, id) in Markdown."""
    return sealed(
        "\n".join(["# kernels", "", *table(heads, [list(row) for row in rows]), "", "End."])
    )


def read(text):
    return notes.read(text.encode(), "REPORT.md")


def texts(text):
    return {id: note.text for id, note in read(text).notes.items()}


def fault(text):
    with pytest.raises(ConfigError) as caught:
        notes.read(text if isinstance(text, bytes) else text.encode(), "REPORT.md")
    return str(caught.value)


AS_WRITTEN = report(("kernel 7", "0.5", "", "aaaa"), ("kernel 41", "0.4", "", "bbbb"))


def test_a_report_as_it_was_written_is_untouched_and_has_no_notes():
    assert read(AS_WRITTEN) == notes.Written({}, frozenset({"aaaa", "bbbb"}), True)


def test_a_note_that_is_typed_is_read_and_is_no_other_change():
    typed = AS_WRITTEN.replace("| 0.4 |  |", "| 0.4 | softer, less robotic |")
    found = read(typed)
    assert found.untouched
    assert found.notes == {"bbbb": notes.Note("bbbb", "kernel 41", "softer, less robotic")}


def test_columns_that_an_editor_has_widened_and_windows_line_ends_are_no_change():
    wide = AS_WRITTEN.replace("| 0.4 |  | bbbb |", "|   0.4   |  harsh     |   `bbbb` |")
    wide = wide.replace("| --- |", "|:-------|", 1).replace("| variant |", "|  variant      |")
    assert texts(wide) == {"bbbb": "harsh"}
    assert read(wide.replace("`", "")).untouched
    assert read(wide.replace("`", "").replace("\n", "\r\n")).untouched
    assert texts("\ufeff" + wide) == {"bbbb": "harsh"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("| 0.4 |", "| 0.3 |"),
        ("End.", "End. I like the second one."),
        ("# kernels", "# Kernels"),
        ("| kernel 7 | 0.5 |  | aaaa |\n", ""),
        ("<!-- bgray.report", "<!-- "),
        ("End.", "End.\n\n```\ncode\n```"),
    ],
)
def test_any_other_change_is_noticed(before, after):
    assert before in AS_WRITTEN
    assert not read(AS_WRITTEN.replace(before, after)).untouched


def test_columns_may_be_reordered_and_rows_without_outer_pipes_are_read():
    text = "id | **Ear notes** | variant\n--- | :---: | ---\naaaa | dull | kernel 7\n"
    assert texts(text) == {"aaaa": "dull"}


def test_an_escaped_pipe_is_part_of_the_note_and_is_escaped_again():
    text = report(("a", "0.5", note_cell("7 | 41, a\\|b"), "aaaa"))
    assert texts(text) == {"aaaa": "7 | 41, a\\|b"}
    assert "7 \\| 41" in text


VISIBLE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=60).map(str.strip)


@given(VISIBLE, VISIBLE)
def test_whatever_is_noted_of_whatever_variant_comes_back_and_is_no_change(note, label):
    empty = report((cell(label), "0.5", "", "aaaa"), ("b", "-", "kept", "bbbb"))
    typed = report((cell(label), "0.5", note_cell(note), "aaaa"), ("b", "-", "kept", "bbbb"))
    assert texts(typed) == ({"aaaa": note} if note else {}) | {"bbbb": "kept"}
    assert read(typed).untouched
    assert read(empty).untouched
    seal = empty.splitlines()[-1]
    assert read("\n".join([*typed.splitlines()[:-1], seal])).untouched


def test_tables_in_code_and_tables_of_other_things_have_no_notes():
    other = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    code = "````text\n| ear notes | id |\n| --- | --- |\n| no | cccc |\n```\n| no | dddd |\n````\n"
    assert texts(other + "\n" + code + "\n" + AS_WRITTEN) == {}


def test_a_pipe_in_a_note_that_is_not_escaped_is_refused_with_its_line():
    said = fault(AS_WRITTEN.replace("| 0.4 |  |", "| 0.4 | soft | dull |"))
    assert "line 6: has 5 cells where the table has 4 columns" in said
    assert "write \\|" in said
    assert "--to FOLDER" in said


def test_a_note_broken_over_two_lines_is_refused():
    said = fault(AS_WRITTEN.replace("| 0.4 |  | bbbb |", "| 0.4 | soft\nand dull | bbbb |"))
    assert "line 6: has ear notes and no id; a note is one line (write <br>" in said


def test_two_different_notes_of_one_variant_are_refused_and_equal_ones_are_one():
    row = ("kernel 7", "0.5", "soft", "aaaa")
    assert texts(report(row, row)) == {"aaaa": "soft"}
    said = fault(report(row, ("kernel 7", "0.5", "harsh", "aaaa")))
    assert "line 6: is a second row of aaaa, with another note" in said


def test_a_merge_that_is_not_finished_is_refused():
    merged = AS_WRITTEN.replace("| kernel 41", "<<<<<<< HEAD\n| kernel 41")
    assert "line 6: is of a merge that is not finished" in fault(merged)


def test_a_table_without_ids_a_file_of_something_else_and_bytes_that_are_no_text_are_refused():
    assert "line 3: is the head of a table whose column 'id' is gone" in fault(
        AS_WRITTEN.replace("| id |", "| who |")
    )
    assert "holds no table with the columns 'ear notes' and 'id'" in fault("# My report\n")
    assert "line 2: is not UTF-8" in fault(b"# a\n\xff\xfe")


def test_an_empty_file_has_nothing_to_lose():
    assert read(" \n").untouched


def test_markup_in_a_label_is_shown_and_not_obeyed():
    assert cell("<b> a|b *c* `d` _e_ val_stft") == "\\<b> a\\|b \\*c\\* \\`d\\` \\_e\\_ val_stft"
    assert cell("[x](y)\nz &lt;\x07") == "[x]\\(y) z &amp;lt;"


@pytest.mark.parametrize("id", ["my_sweep-2/0a1b", "a|b/c", "<x>\n\r\t`y` %20/ü", "\\", "_a_/ b "])
def test_an_id_of_any_letters_comes_back_from_a_cell(id):
    typed = report(("a", "0.5", "soft", notes.id_cell(id)))
    assert texts(typed) == {id: "soft"}
    assert read(typed).ids == {id}
    assert notes.id_cell("my_sweep-2/0a1b") == "my_sweep-2/0a1b"


@pytest.mark.parametrize(
    ("before", "rows", "wanted"),
    [
        ({"v"}, {"v": "/r/a/v"}, {}),  # it has its row
        ({"v"}, {"a/v": "/r/a/v", "a/w": "/r/a/w"}, {"v": "a/v"}),
        ({"v"}, {"a/v": "/r/a/v", "b/v": "/r/b/v"}, {}),  # whose?
        ({"a/v", "b/v"}, {"v": "/r/a/v"}, {"a/v": "v"}),
        ({"b/v"}, {"v": "/r/a/v"}, {}),  # another sweep's
        ({"a/v"}, {"r/a/v": "/x/r/a/v", "q/a/v": "/x/q/a/v"}, {}),
        ({"r/a/v"}, {"a/v": "/x/r/a/v", "q/a/v": "/x/q/a/v"}, {"r/a/v": "a/v"}),
        ({"old/a/v"}, {"a/v": "/x/r/a/v"}, {"old/a/v": "a/v"}),  # the folder has moved
        ({"p/a/v", "q/a/v"}, {"a/v": "/x/a/v"}, {}),  # which?
        ({"a/v", "p/a/v"}, {"a/v": "/x/p/a/v"}, {}),  # the row has its own
    ],
)
def test_a_row_is_found_again_by_sweep_and_variant(before, rows, wanted):
    assert notes.moved(before, rows) == wanted
