import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bgray import holder, probes, records, storage
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
        {"step": step, "loss": round(0.1 * step, 7)} for step in range(1, 8)
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


@pytest.mark.parametrize("name", [METRICS, TIMING, ITEMS])
@pytest.mark.parametrize(
    "torn", [b'{"step":2,"lo', b'{"step":2', b"{", b'{"step":2}', b"\x00\x00\x00", b"\xff{"]
)
def test_a_last_line_that_a_crash_tore_is_left_out_and_then_cut_off(tmp_path, tiny, name, torn):
    url = str(tmp_path / "run")
    started(url, tiny)
    path = storage.join(url, name)
    storage.write_bytes(path, b'{"step":1}\n' + torn)
    whole = [{"step": 1}, {"step": 2}] if torn.endswith(b"}") else [{"step": 1}]
    assert read_lines(path) == whole
    run = started(url, tiny, from_step=1)
    run.append(name, {"step": 2, "loss": 0.5})
    run.flush()
    assert storage.read_bytes(path) == b'{"step":1}\n{"step":2,"loss":0.5}\n'


def test_each_step_is_there_once_after_a_kill_at_any_byte_of_the_last_lines(tmp_path, tiny):
    url = str(tmp_path / "run")
    run = started(url, tiny)
    for step in range(1, 6):
        run.append(METRICS, {"step": step, "loss": 1 / step})
    whole = Path(url, METRICS).read_bytes()
    checkpoint = whole.index(b'{"step":4')  # at step 3; what came before it was made durable
    for cut in range(checkpoint, len(whole) + 1):
        Path(url, METRICS).write_bytes(whole[:cut])
        run._cut(METRICS, 3)
        for step in (4, 5):
            run.append(METRICS, {"step": step, "loss": 1 / step})
        assert Path(url, METRICS).read_bytes() == whole


def test_uncommitted_changes_are_kept_once_and_an_attempt_says_what_is_new(
    tmp_path, tiny, monkeypatch
):
    diff = {"dirty_diff": "+" * 20_000, "dirty_diff_cut": False, "new_files": {"a.py": "x"}}
    facts = {"host": "h", "commit": "c", "packages": {"torch": "1"}, "gpu": None, **diff}
    monkeypatch.setattr(records, "machine", lambda: dict(facts))
    url = str(tmp_path / "run")
    for i in range(30):
        started(url, tiny, from_step=i)
    attempts = read_info(url)["attempts"]
    (file,) = Path(url).glob("changes-*.json")
    assert json.loads(file.read_text()) == diff
    assert attempts[0]["changes"] == file.name
    assert attempts[0]["packages"] == {"torch": "1"}
    assert all(a["commit"] == "c" and a["host"] == "h" for a in attempts)
    assert all("packages" not in a and "changes" not in a for a in attempts[1:])
    assert Path(url, "run.json").stat().st_size < 15_000
    facts |= {"gpu": "big", "dirty_diff": "", "new_files": {}}  # committed, on another machine
    started(url, tiny, from_step=30)
    last = read_info(url)["attempts"][-1]
    assert (last["gpu"], last["changes"]) == ("big", None)
    started(url, tiny, from_step=31)
    assert "gpu" not in read_info(url)["attempts"][-1]


def test_the_folder_of_a_long_run_stays_below_two_megabytes(tmp_path, tiny):
    """10,000 steps, logged every 10 and validated every 100 on 64 items by 3 scores, as they come:
    with all the digits that float64 has."""
    rng = np.random.default_rng(0)
    names, timing = ("val_stft", "val_si_sdr", "val_usdr"), probes.Clock(torch.device("cpu"))
    run = started(str(tmp_path), tiny)
    run.update(baseline_items={name: rng.normal(-20, 9, 64).tolist() for name in names})
    for step in range(10, 10_001, 10):
        values = dict(zip(("loss", "loss_l1", "loss_mel", "grad_norm"), rng.random(4), strict=True))
        run.append(METRICS, {"step": step, **values, "lr_scale": rng.random()})
        run.append(TIMING, {"step": step, **timing.summary()})
        if step % 100 == 0:
            items = {name: rng.normal(-20, 9, 64).tolist() for name in names}
            run.append(METRICS, {"step": step, "val": dict.fromkeys(names, rng.random())})
            run.append(ITEMS, {"step": step, **items})
    for i in range(20):
        run.update(warnings=["x" * 200] * i)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 1_000_000
    assert len(read_lines(str(tmp_path / METRICS))) == 1100


def test_the_fence_reads_run_json_only_when_it_has_changed(tmp_path, tiny, monkeypatch):
    run, reads = started(str(tmp_path), tiny), []
    read = records.read_info
    monkeypatch.setattr(records, "read_info", lambda url: reads.append(url) or read(url))
    for step in range(1, 101):
        run.append(METRICS, {"step": step})
    assert len(reads) <= 1
    run.update(step=100)
    run.append(METRICS, {"step": 101})
    run.append(METRICS, {"step": 102})
    assert len(reads) <= 2
    started(str(tmp_path), tiny, from_step=102)
    with pytest.raises(records.Superseded):
        run.append(METRICS, {"step": 103})


def test_a_line_that_is_read_is_written_as_it_was(tmp_path, tiny):
    rng = np.random.default_rng(1)
    run = started(str(tmp_path), tiny)
    for step in range(200):
        spread = rng.normal(0, 1, 8) * 10 ** rng.uniform(-12, 12, 8)
        run.append(ITEMS, {"step": step, "val": [*spread.tolist(), None, 3, 0.0]})
    before = Path(tmp_path, ITEMS).read_bytes()
    run._cut(ITEMS, 200)
    assert Path(tmp_path, ITEMS).read_bytes() == before


def test_a_mistake_in_what_was_given_is_told_with_its_place_also_through_ray():
    place = "/shards/train-00000.parquet, row group 3"
    error = ConfigError(place, [("", "chunk a.wav @0, voice audio: corrupt (lost sync)")])
    said = f"{place}: chunk a.wav @0, voice audio: corrupt (lost sync)"
    assert records.reason(error) == said
    outer = RuntimeError("pages of frames")
    outer.cause = error  # as ray.exceptions.RayTaskError has it
    assert records.reason(outer) == said
    outer = RuntimeError("the worker died")
    outer.__cause__ = error
    assert records.reason(outer) == said


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
        "pid_started": holder._started(other.pid),
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


def test_without_proc_a_process_lives_as_long_as_its_number_answers(monkeypatch):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    attempt = {"host": platform.node(), "pid": other.pid, "pid_started": None}
    info = {"state": "running", "attempts": [attempt]}
    try:
        assert records.alive(info) is None  # with /proc it would have said when it began
        monkeypatch.setattr(holder, "PROC", "/no/proc")
        assert holder.process() == {"pid": os.getpid(), "pid_started": None}
        assert records.alive(info) == other.pid
    finally:
        other.kill()
        other.wait()
    assert records.alive(info) is None


@pytest.mark.parametrize(
    "text",
    [
        b'{"state": "runn',
        b"\xff\xfe",
        b"[1]",
        b"null",
        b'{"attempts": 3}',
        b'{"attempts": [3]}',
        b'{"step": "4"}',
        b'{"metrics": null}',
    ],
)
def test_a_damaged_run_json_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"run.json:\n  is damaged \(.*move its folder away"):
        records.read_info(str(tmp_path))


@pytest.mark.parametrize("name", [METRICS, TIMING, ITEMS])
@pytest.mark.parametrize("bad", [b'{"step":2,"lo', b"\xff\xff", b"\0" * 9, b"", b"2"])
def test_a_damaged_line_before_others_is_named_and_nothing_is_deleted(tmp_path, tiny, name, bad):
    url = str(tmp_path)
    started(url, tiny)
    content = b'{"step":1}\n' + bad + b'\n{"step":3}\n'
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}:\n  line 2 of 3 is damaged .* or move its"):
        read_lines(str(tmp_path / name))
    with pytest.raises(ConfigError, match="line 2 of 3"):
        started(url, tiny, from_step=3)
    assert (tmp_path / name).read_bytes() == content
    info = read_info(url)
    assert info["state"] == "failed"
    assert "line 2 of 3 is damaged" in info["reason"]


def test_no_line_is_cut_before_the_record_names_the_process_that_cuts(tmp_path, tiny, monkeypatch):
    url = str(tmp_path)
    zombie = started(url, tiny)
    for step in (1, 2, 3):
        zombie.append(METRICS, {"step": step})
    cut = Run._cut

    def killed(run, name, step):
        with pytest.raises(records.Superseded):
            zombie.append(METRICS, {"step": 4})
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_cut", killed)
    with pytest.raises(KeyboardInterrupt):
        started(url, tiny, from_step=1)
    monkeypatch.setattr(Run, "_cut", cut)
    assert [line["step"] for line in read_lines(str(tmp_path / METRICS))] == [1, 2, 3]
    started(url, tiny, from_step=1)
    assert [line["step"] for line in read_lines(str(tmp_path / METRICS))] == [1]
    assert [a["from_step"] for a in read_info(url)["attempts"]] == [0, 1, 1]


def test_a_process_that_another_one_has_replaced_writes_nothing_more(root, tiny):
    url = storage.join(root, "run")
    zombie = started(url, tiny)
    zombie.append(METRICS, {"step": 1, "loss": 0.1})
    zombie.flush()
    successor = started(url, tiny, from_step=1)
    before = read_info(url)
    for write in (
        lambda: (zombie.append(TIMING, {"step": 2}), zombie.flush()),
        zombie.flush,
        lambda: zombie.update(warnings=["still here"]),
    ):
        with pytest.raises(records.Superseded, match="taken this run over"):
            write()
    assert read_info(url) == before
    assert read_lines(storage.join(url, TIMING)) == []
    successor.append(METRICS, {"step": 2, "loss": 0.2})
    successor.flush()  # it is not disturbed
    assert [line["step"] for line in read_lines(storage.join(url, METRICS))] == [1, 2]


def test_being_replaced_is_no_failure_of_the_run(tmp_path, tiny):
    url = str(tmp_path / "run")
    started(url, tiny)
    with records.recorded_failure(url):
        raise records.Superseded("by another")
    assert read_info(url)["state"] == "running"


@pytest.mark.parametrize(
    ("attempts", "vain"),
    [
        ([(8, "s", None)] * 3, True),
        ([(8, "s", None)] * 2, False),
        ([(0, "s", None), (8, "s", None), (8, "s", None), (8, "s", None)], True),
        ([(0, "s", None), (4, "s", None), (8, "s", None)], False),  # each got further
        ([(8, "before", None)] * 3, False),  # somebody has asked again
        ([(8, "s", "interrupted")] * 3, False),  # machines were taken away
        ([(8, "s", "failed")] * 3, True),
        ([], False),
    ],
)
def test_a_run_whose_processes_die_without_getting_further_is_given_up(attempts, vain):
    info = {"attempts": [{"from_step": f, "session": s, "ended": e} for f, s, e in attempts]}
    assert records.died_in_vain(info, "s", 8) is vain


def test_each_attempt_says_how_it_ended(tmp_path, tiny):
    run = started(str(tmp_path / "run"), tiny)
    run.update(state="interrupted", reason=records.NOTICE)
    run.begin(3, "session")
    first, second = read_info(run.url)["attempts"]
    assert (first["ended"], second["session"]) == ("interrupted", "session")
    assert "ended" not in second
