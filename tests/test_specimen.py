"""A made-up sweep is one that the readers of real ones take."""

import io

import pytest
import soundfile

from bgray import storage
from bgray.compare import compare_sweep
from bgray.records import read_info, read_lines
from bgray.specimen import Made, make


def test_the_files_are_those_of_a_real_sweep_and_agree_with_each_other(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a"), Made("b", gain=0.1)], seeds=2, steps=100, log_every=5, items=3, clips=0)
    said = compare_sweep(url)
    assert (said.metric, said.mode, said.baseline) == ("val_stft", "min", "a")
    assert said.rows[1].parts.mean == pytest.approx(-0.1, abs=0.02)
    (first, *others) = [p for p in storage.stamps(url) if p.endswith("run.json")]
    assert len(others) == 3
    run = f"{url}/{first.rpartition('/')[0]}"
    lines = read_lines(f"{run}/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(5, 101, 5))
    evaluated = [line for line in lines if "val" in line]
    items = read_lines(f"{run}/validation_items.jsonl")
    for line, item in zip(evaluated, items, strict=True):
        assert line["step"] == item["step"]
        assert line["val"]["val_stft"] == pytest.approx(sum(item["val_stft"]) / 3, rel=1e-5)
    assert read_info(run)["metrics"]["val_stft"] == pytest.approx(evaluated[-1]["val"]["val_stft"])


def test_the_same_sweep_is_the_same_to_the_byte(tmp_path):
    contents = []
    for place in ("one", "two"):
        url = str(tmp_path / place / "sweep")
        make(url, [Made("a")], seeds=1, steps=20, items=2, clips=1, clip_seconds=0.1)
        contents.append({path: storage.read_bytes(f"{url}/{path}") for path in storage.stamps(url)})
    assert contents[0] == contents[1]


def test_a_trial_that_failed_stops_where_it_is_said(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a", state="failed", until=40, reason="why")], seeds=1, steps=100, clips=0)
    (path,) = [p for p in storage.stamps(url) if p.endswith("run.json")]
    run = f"{url}/{path.rpartition('/')[0]}"
    info = read_info(run)
    assert (info["state"], info["reason"], info["step"]) == ("failed", "why", 40)
    assert max(line["step"] for line in read_lines(f"{run}/metrics.jsonl")) == 40


def test_clips_of_several_sources_lie_where_a_run_writes_them(tmp_path):
    url = str(tmp_path / "sweep")
    make(
        url,
        [Made("a")],
        seeds=1,
        steps=20,
        evaluations=2,
        items=2,
        clips=1,
        clip_steps=1,
        clip_seconds=0.25,
        sample_rate=8000,
        sources=("vocals", "rest"),
    )
    clips = {p.rsplit("/", 1)[-1]: p for p in storage.stamps(url) if "/clips/" in p}
    assert set(clips) == {
        "000-input.wav",
        "000-target-vocals.wav",
        "000-target-rest.wav",
        "000-step-000020-vocals.wav",
        "000-step-000020-rest.wav",
    }
    found = [
        soundfile.read(io.BytesIO(storage.read_bytes(f"{url}/{path}"))) for path in clips.values()
    ]
    assert {(len(sound), rate) for sound, rate in found} == {(2000, 8000)}
    assert len({sound.tobytes() for sound, _ in found}) == len(found)
