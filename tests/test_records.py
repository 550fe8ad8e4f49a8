import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bgray import records, storage
from bgray.config import ConfigError
from bgray.experiment import resolve
from bgray.records import ITEMS, METRICS, TIMING, Run, read_info, read_lines


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)


def started(url, tiny, *, from_step=0, data_hash="d" * 64):
    run = Run(url, resolve(tiny, "test"), data_hash)
    run.begin(from_step, data_hash=data_hash)
    return run


def test_lines_come_back_in_order_once_each_however_often_it_is_flushed(root, tiny):
    url = storage.join(root, "run")
    run = started(url, tiny)
    for step in range(1, 8):
        run.append(METRICS, {"step": step, "loss": 0.1 * step})
        if step % 3 == 0:
            run.flush()
    run.flush()
    run.flush()
    assert read_lines(storage.join(url, METRICS)) == [
        {"step": step, "loss": 0.1 * step} for step in range(1, 8)
    ]
    assert read_lines(storage.join(url, TIMING)) == []


def test_lines_are_on_s3_after_a_flush_and_on_disk_at_once(root, tiny):
    url = storage.join(root, "run")
    run = started(url, tiny)
    run.append(METRICS, {"step": 1})
    expected = [] if storage.is_remote(url) else [{"step": 1}]
    assert read_lines(storage.join(url, METRICS)) == expected
    run.flush()
    assert read_lines(storage.join(url, METRICS)) == [{"step": 1}]


def test_going_on_cuts_off_what_comes_after_the_checkpoint_byte_for_byte(root, tiny):
    url = storage.join(root, "run")
    run, bytes_at_4 = started(url, tiny), b""
    for step in range(1, 8):
        run.append(METRICS, {"step": step, "loss": 1 / 3 * step})
        run.append(ITEMS, {"step": step, "val_stft": [1e-7, 0.3]})
        run.flush()
        if step == 4:
            bytes_at_4 = storage.read_bytes(storage.join(url, METRICS))
    again = started(url, tiny, from_step=4)
    assert storage.read_bytes(storage.join(url, METRICS)) == bytes_at_4
    again.append(METRICS, {"step": 5})
    again.flush()
    steps = [line["step"] for line in read_lines(storage.join(url, METRICS))]
    assert steps == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_lines(storage.join(url, ITEMS))] == [1, 2, 3, 4]
    assert [a["from_step"] for a in read_info(url)["attempts"]] == [0, 4]


def test_a_last_line_that_a_crash_tore_is_left_out_and_then_cut_off(root, tiny):
    url = storage.join(root, "run")
    started(url, tiny)
    path = storage.join(url, METRICS)
    storage.write_bytes(path, b'{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    run = started(url, tiny, from_step=9)
    run.append(METRICS, {"step": 3})
    run.flush()
    assert storage.read_bytes(path) == b'{"step": 1}\n{"step": 3}\n'


def test_a_folder_of_another_config_is_refused_naming_the_difference(root, tiny):
    url = storage.join(root, "run")
    started(url, tiny)
    before = storage.read_bytes(storage.join(url, "experiment.yaml"))
    tiny["train"]["batch_size"] = 8
    with pytest.raises(ConfigError) as caught:
        started(url, tiny)
    assert "holds a run of another config: train.batch_size: 4 there, 8 now" in str(caught.value)
    assert "--set runtime.results=FOLDER" in str(caught.value)
    assert storage.read_bytes(storage.join(url, "experiment.yaml")) == before


def test_a_folder_made_from_other_data_is_refused(tmp_path, tiny):
    started(str(tmp_path), tiny, data_hash="a" * 64)
    with pytest.raises(ConfigError, match="data: aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
        started(str(tmp_path), tiny, data_hash="b" * 64)


def test_another_runtime_name_or_place_of_the_same_data_is_the_same_run(tmp_path, tiny):
    started(str(tmp_path), tiny)
    tiny["name"], tiny["runtime"]["log_every"] = "renamed", 7
    tiny["data"]["path"] = "/moved"
    started(str(tmp_path), tiny, from_step=2)
    assert len(read_info(str(tmp_path))["attempts"]) == 2


@pytest.mark.parametrize(
    ("state", "after"),
    [
        ("running", ("failed", "the node is gone")),
        *[(state, (state, "its own words")) for state in (*records.ENDED, "interrupted")],
    ],
)
def test_what_a_run_said_of_its_end_stands_and_only_silence_is_filled_in(
    tmp_path, tiny, state, after
):
    started(str(tmp_path), tiny).update(state=state, reason="its own words")
    records.close_from_outside(str(tmp_path), "failed", "the node is gone")
    info = read_info(str(tmp_path))
    assert (info["state"], info["reason"]) == after
    assert len(info["attempts"]) == 1


def test_a_run_that_died_before_its_record_gets_one_from_outside(root):
    url = storage.join(root, "0123456789ab")
    records.close_from_outside(url, "failed", "no GPU")
    assert read_info(url) == {"id": "0123456789ab", "state": "failed", "reason": "no GPU"}


def test_a_failure_goes_into_the_record_with_its_traceback_and_not_to_the_caller(root, tiny):
    url = storage.join(root, "run")
    started(url, tiny)
    with records.recorded_failure(url):
        raise RuntimeError("frames\n\n  the cause  \n")
    info = read_info(url)
    assert (info["state"], info["reason"]) == ("failed", "RuntimeError: the cause")
    text = storage.read_bytes(storage.join(url, "error.txt")).decode()
    assert text.startswith("Traceback")
    assert 'raise RuntimeError("frames' in text


def test_workers_that_die_because_the_scheduler_pruned_them_are_no_failure(tmp_path, tiny):
    started(str(tmp_path), tiny)
    with records.recorded_failure(str(tmp_path), stopped=lambda: True):
        raise RuntimeError("actor died")
    info = read_info(str(tmp_path))
    assert (info["state"], info["reason"]) == ("stopped", "pruned by ASHA")
    assert not Path(tmp_path, "error.txt").exists()


def test_ctrl_c_is_not_swallowed_as_a_failure(tmp_path, tiny):
    started(str(tmp_path), tiny)
    with pytest.raises(KeyboardInterrupt), records.recorded_failure(str(tmp_path)):
        raise KeyboardInterrupt
    assert read_info(str(tmp_path))["state"] == "running"


def test_a_reason_is_one_line_of_at_most_500_characters():
    assert records.reason(ValueError("")) == "ValueError: "
    assert records.reason(ValueError("x" * 900)) == "ValueError: " + "x" * 488


def test_runs_lists_the_folders_that_have_a_record_and_nothing_else(root):
    sweep = storage.join(root, "sweep")
    for name in ("bbbbbbbbbbbb", "aaaaaaaaaaaa"):
        records.close_from_outside(storage.join(sweep, name), "failed", "x")
    storage.write_bytes(storage.join(sweep, "cccccccccccc", "experiment.yaml"), b"")
    storage.write_bytes(storage.join(sweep, "validation-123.json"), b"{}")
    found = records.runs(sweep)
    assert [(run.id, run.state) for run in found] == [
        ("aaaaaaaaaaaa", "failed"),
        ("bbbbbbbbbbbb", "failed"),
    ]
    assert found[0].url == storage.join(sweep, "aaaaaaaaaaaa")


def test_run_json_is_whole_while_it_is_being_rewritten(tmp_path, tiny, monkeypatch):
    run = started(str(tmp_path), tiny)
    run.update(step=3)

    def dies(*_):
        raise OSError("power cut")

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(OSError, match="power cut"):
        run.update(step=4)
    assert json.loads(Path(tmp_path, "run.json").read_text())["step"] == 3


def test_a_run_that_another_living_process_is_at_is_refused(tmp_path, monkeypatch):
    url = str(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    attempt = {
        "host": platform.node(),
        "pid": other.pid,
        "pid_started": records._started(other.pid),
    }
    info = {"state": "running", "attempts": [attempt]}
    (tmp_path / "run.json").write_text(json.dumps(info))
    try:
        with pytest.raises(ConfigError, match=f"process {other.pid} on this machine is training"):
            records.refuse_while_alive(url, patience_seconds=0.1)
        # Another process with that number later is somebody else.
        stranger = {**info, "attempts": [{**attempt, "pid_started": "1"}]}
        assert records.alive(stranger) is None
        assert records.alive({**info, "state": "interrupted"}) is None
    finally:
        other.kill()
        other.wait()
    records.refuse_while_alive(url, patience_seconds=0)


def test_a_damaged_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "runn')
    with pytest.raises(ConfigError, match="run.json:\n  is damaged"):
        records.read_info(str(tmp_path))
