import io
import json

import pytest
from rich.console import Console

from bgray.console import Board, Row, duration, time_to_10k


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (41, "41 s"), (29 * 60, "29 min"), (3.5 * 3600, "3.5 h"), (6 * 86400, "6 days")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_an_extrapolated_time_is_marked():
    timing = {"time_to_10k_steps": 1740.0, "time_to_10k_steps_extrapolated": True}
    assert time_to_10k(timing) == "~29 min"
    assert time_to_10k({**timing, "time_to_10k_steps_extrapolated": False}) == "29 min"
    assert time_to_10k({**timing, "packed": True}) == "(~29 min)"
    assert time_to_10k({}) == "-"


@pytest.fixture
def run(tmp_path):
    """A run's folder that a test writes to as a trial would."""

    def write(**info):
        (tmp_path / "run.json").write_text(json.dumps(info))

    def timing(*lines):
        (tmp_path / "timing.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    write.timing, write.url = timing, str(tmp_path)
    return write


def board(run, *, terminal=False):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    return Board("t", [Row("abc", "lr=1", run.url, 100)], "val_stft", console), out


def test_a_running_trial_shows_the_step_of_its_last_timing_line(run):
    b, _ = board(run)
    row = b.rows[0]
    row.refresh()
    assert row.state == "waiting"
    run(state="running", step=0)
    run.timing({"step": 10, "steps_per_second": 2.0}, {"step": 20, "steps_per_second": 4.0})
    row.refresh()
    assert (row.step, row.eta_seconds) == (20, 20.0)


def test_piped_output_has_one_line_per_evaluation_and_change_of_state(run):
    b, out = board(run)
    with b.live(seconds=60):
        run(state="running", step=50, metrics={"step": 50, "val_stft": 1.25})
        b._tick(None)
        b._tick(None)
        run(state="diverged", step=60, metrics={"step": 50, "val_stft": 1.25}, reason="NaN at 60")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "abc lr=1: step 50/100, val_stft 1.25, running" in lines[0]
    assert lines[1].endswith("diverged (NaN at 60)")


def test_what_an_earlier_command_did_is_not_news(run):
    run(state="finished", step=100, metrics={"step": 100, "val_stft": 1.0})
    b, out = board(run)
    with b.live(seconds=60):
        pass
    assert out.getvalue() == ""


def test_a_terminal_gets_one_live_table_with_every_column(run):
    run(state="running", step=50, metrics={"step": 50, "val_stft": 1.25})
    run.timing(
        {
            "step": 60,
            "steps_per_second": 4.0,
            "vram_peak_gib": 6.5,
            "data_wait_share": 0.125,
            "time_to_10k_steps": 2500.0,
            "time_to_10k_steps_extrapolated": True,
        }
    )
    b, out = board(run, terminal=True)
    with b.live(seconds=60):
        pass
    text = out.getvalue()
    for shown in ("lr=1", "60/100", "1.2500", "6.50", "12%", "~42 min", "10 s", "running"):
        assert shown in text
