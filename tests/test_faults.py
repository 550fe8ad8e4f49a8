"""What goes wrong under a running training: each fault ends in one line that says what and where,
and the same command, once it is mended, ends with the undisturbed run's bytes."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bgray import checkpoint, data, feed, records, shards, storage
from bgray import train as command
from bgray.context import Context
from bgray.experiment import build_recipe, prepare_data, resolve, run_url
from bgray.records import read_info
from bgray.trial import run_trial

CURVES = ("metrics.jsonl", "validation_items.jsonl")
AT_STEP = 10  # of 24, with a checkpoint every 4


class Training:
    """An experiment with shards of its own, trained by the command that a person would type."""

    def __init__(self, raw, place):
        raw = copy.deepcopy(raw)
        self.shards = place / "shards"
        shutil.copytree(raw["data"]["path"], self.shards)
        raw["data"] |= {"path": str(self.shards), "row_groups_per_unit": 1}
        raw["runtime"]["results"] = str(place / "results")
        raw["validation"]["clips"] = 2
        self.file = place / "tiny.yaml"
        self.file.write_text(yaml.safe_dump(raw))
        self.experiment = resolve(raw, "test")
        self.url = run_url(self.experiment)

    def command(self):
        """Exit code of `python -m bgray.train FILE --local`, in this process."""
        try:
            command.main([str(self.file), "--local"])
        except SystemExit as ended:
            return ended.code
        return 0

    def curves(self):
        return [storage.read_bytes(f"{self.url}/{name}") for name in CURVES]

    def info(self):
        return read_info(self.url)

    def group_of(self, step):
        """(shard file, row group) that this step and those of its unit are cut from."""
        recipe = build_recipe(self.experiment, prepare_data(self.experiment))
        ((name, group),) = data.groups_of(recipe, recipe.unit_of(step))
        return self.shards / name, group


@pytest.fixture(scope="module")
def undisturbed(shards_url, tmp_path_factory):
    from conftest import TINY

    raw = copy.deepcopy(TINY)
    raw["name"], raw["data"]["path"] = "tiny", shards_url
    training = Training(raw, tmp_path_factory.mktemp("undisturbed"))
    prepared = prepare_data(training.experiment)
    run_trial(training.experiment, prepared, Context())
    return training.curves()


@pytest.fixture
def training(tiny, tmp_path):
    return Training(tiny, tmp_path)


def goes_on(training, undisturbed):
    """The same command again ends with the bytes of the run that nothing happened to."""
    from_step = (checkpoint.load(training.url) or {"step": 0})["step"]
    assert training.command() == 0
    info = training.info()
    assert (info["state"], info["reason"]) == ("finished", None)
    assert [attempt["from_step"] for attempt in info["attempts"]] == [0, from_step]
    assert training.curves() == undisturbed
    return from_step


# --- the disk


class HalfWritten:
    """An open file on a disk that is full after the next few bytes; as the kernel, it does not say
    which file it is about."""

    def __init__(self, file, number):
        self.file, self.number = file, number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError(self.number, os.strerror(self.number))


def spoil_lines(monkeypatch, name, number):
    class Spoilt(type(Path())):
        def open(self, mode="r", **options):
            file = super().open(mode, **options)
            if mode == "a" and self.name == name and f'"step":{AT_STEP - 2}' in self.read_text():
                return HalfWritten(file, number)
            return file

    monkeypatch.setattr(records, "Path", Spoilt)


def spoil_files(monkeypatch, what, number):
    write = storage.write_bytes

    def spoilt(url, content):
        if what in url:
            raise OSError(number, os.strerror(number), url)
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", spoilt)


DISK = {
    "No space left on device": errno.ENOSPC,
    "Permission denied": errno.EACCES,
    "Read-only file system": errno.EROFS,
    "Disk quota exceeded": errno.EDQUOT,
}


@pytest.mark.parametrize(
    ("what", "said", "kept"),
    [
        ("metrics.jsonl", "No space left on device", 4),
        ("timing.jsonl", "Disk quota exceeded", 8),
        ("validation_items.jsonl", "No space left on device", 12),
        ("checkpoint/step-00000012", "No space left on device", 8),
        ("checkpoint/step-00000012", "Read-only file system", 8),
        ("clips/000-step-000016", "Permission denied", 12),
    ],
)
def test_a_disk_that_takes_no_more_is_named_with_the_file_and_costs_nothing(
    training, undisturbed, monkeypatch, capsys, what, said, kept
):
    spoil = spoil_lines if what.endswith(".jsonl") else spoil_files
    spoil(monkeypatch, what, DISK[said])
    assert training.command() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {said} ({training.url}/{what}")
    assert error.endswith("mend that and run the same command again: it continues\n")
    info = training.info()
    assert info["state"] == "failed"
    assert said in info["reason"]
    assert f"{training.url}/{what}" in info["reason"]
    monkeypatch.undo()
    assert goes_on(training, undisturbed) == kept


def test_a_disk_too_full_for_the_record_leaves_the_run_to_the_same_command(
    training, undisturbed, monkeypatch, capsys
):
    write, full = storage.write_bytes, []

    def spoilt(url, content):
        if full or "checkpoint/step-00000012" in url:
            full.append(url)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), url)
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", spoilt)
    assert training.command() == 2
    assert "No space left on device" in capsys.readouterr().err
    assert training.info()["state"] == "running"  # it could not say
    monkeypatch.undo()
    assert goes_on(training, undisturbed) == 8


REAL_DISK = """
set -e
mount -t tmpfs -o size=360k none {place}
{python} -m bgray.train {file} --local > {out}/first 2>&1 || true
mount -o remount,size=64m {place}
{python} -m bgray.train {file} --local > {out}/second 2>&1
cp -r {place} {out}/after
"""


@pytest.mark.slow  # two processes that import torch
def test_a_real_disk_that_fills_up_is_survived_once_it_has_room_again(tiny, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    place, out, file = tmp_path / "disk", tmp_path / "out", tmp_path / "tiny.yaml"
    place.mkdir(), out.mkdir()
    tiny["train"]["steps"] = 100
    reference = resolve(copy.deepcopy(tiny), "test")
    tiny["runtime"]["results"] = str(place / "results")
    file.write_text(yaml.safe_dump(tiny))
    script = REAL_DISK.format(place=place, file=file, python=sys.executable, out=out)
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
    first = (out / "first").read_text()
    assert done.returncode == 0, done.stderr + first
    assert f"error: No space left on device ({place}/results/tiny/" in first
    assert "Traceback" not in first
    run_trial(reference, prepare_data(reference), Context())
    ours = out / "after" / Path(run_url(reference)).relative_to(tmp_path)
    for name in CURVES:
        assert (ours / name).read_bytes() == Path(run_url(reference), name).read_bytes()
    assert json.loads((ours / "run.json").read_text())["state"] == "finished"


# --- the data


def flip(file, group):
    """One byte in the middle of a voice of the group's first row."""
    content = bytearray(file.read_bytes())
    row = shards.read_row_group(str(file.parent), file.name, group)[0]
    place = content.index(row.voices["audio"]) + len(row.voices["audio"]) // 2
    content[place] ^= 0xFF
    file.write_bytes(content)
    return f"chunk {row.key} @{row.start}, voice audio: corrupt"


def cut_short(file, group):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "cannot be read ("


def delete(file, group):
    file.unlink()
    return "cannot be read (missing)"


def spoil_shard(monkeypatch, training, spoil):
    """At AT_STEP the next unit's row group is spoilt, before it is read. Returns what is said."""
    in_process, said = feed.in_process, []

    def disturbed(recipe, start, stop, *ranks, **options):
        for unit in range(recipe.unit_of(start), recipe.unit_of(stop - 1) + 1):
            first = unit * recipe.batches_per_unit
            if first == 12:
                said.append(spoil(*training.group_of(first)))
            ends = max(start, first), min(stop, first + 4)
            yield from in_process(recipe, *ends, *ranks, **options)

    monkeypatch.setattr(feed, "in_process", disturbed)
    return said


@pytest.mark.parametrize("spoil", [flip, cut_short, delete])
def test_a_shard_spoilt_under_a_running_training_is_named_and_once_mended_nothing_is_lost(
    training, undisturbed, monkeypatch, capsys, spoil
):
    file, group = training.group_of(12)
    whole = file.read_bytes()
    said = spoil_shard(monkeypatch, training, spoil)
    assert training.command() == 2
    place = f"{file}, row group {group}" if spoil is flip else str(file)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {place}:\n  {said[0]}")
    assert "check with python -m bgray.shards --verify" in error
    info = training.info()
    assert info["state"] == "failed"
    assert info["reason"].startswith(f"{place}: {said[0]}")
    assert "\n" not in info["reason"]
    # Before it is mended the same command says the same, and spoils nothing.
    monkeypatch.undo()
    if spoil is flip:
        assert training.command() == 2
        assert training.info()["reason"] == info["reason"]
    file.write_bytes(whole)
    from_step = checkpoint.load(training.url)["step"]
    assert from_step == 12
    assert training.command() == 0
    assert training.info()["state"] == "finished"
    assert training.curves() == undisturbed


# --- on Ray


@pytest.fixture(scope="module")
def long_shards(tmp_path_factory):
    """Five training row groups, so that one of them can be read late."""
    from conftest import write_songs

    root = tmp_path_factory.mktemp("long")
    options = shards.Options(sample_rate=8000, shifts=(12.0,), validation=0.34)
    songs = write_songs(root / "songs", num=60)
    shards.prepare(str(songs), str(root / "shards"), options, workers=0)
    return str(root / "shards")


@pytest.mark.ray
@pytest.mark.slow
def test_a_corrupt_chunk_that_a_ray_data_task_meets_is_named_and_tried_once(
    tiny, long_shards, tmp_path, capsys
):
    tiny["data"]["path"] = long_shards
    whole = Training(tiny, tmp_path / "whole")
    tiny["runtime"]["feed"] = "ray"
    training = Training(tiny, tmp_path / "ray")
    late = next(s for s in range(8, 24, 4) if training.group_of(s) not in before(training, s))
    file, group = training.group_of(late)
    content = file.read_bytes()
    said = flip(file, group)
    with pytest.raises(SystemExit) as ended:
        command.main([str(training.file)])
    assert ended.value.code == 1
    info = training.info()
    assert info["state"] == "failed"
    assert info["reason"].startswith(f"{file}, row group {group}: {said}")
    assert len(info["attempts"]) == 1  # it would be the same again
    assert info["reason"] in capsys.readouterr().out.replace("\n", "")
    file.write_bytes(content)
    command.main([str(training.file)])
    assert training.info()["state"] == "finished"
    assert whole.command() == 0
    assert training.curves() == whole.curves()


def before(training, step):
    return [training.group_of(earlier) for earlier in range(0, step, 4)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_with_the_others_and_later_with_the_one_whose_shard_was_corrupt(
    tiny, long_shards, tmp_path
):
    from bgray import sweep

    tiny["data"]["path"] = long_shards
    # The same data by another path: with a feed cache either trial takes what the other has made.
    tiny["runtime"]["feed_cache"] = "none"
    whole = Training(tiny, tmp_path / "whole")
    training = Training(tiny, tmp_path / "sweep")
    late = next(s for s in range(8, 24, 4) if training.group_of(s) not in before(training, s))
    file, group = training.group_of(late)
    content = file.read_bytes()
    said = flip(file, group)
    raw = yaml.safe_load(training.file.read_text())
    raw["variants"] = {"bad": {}, "good": {"data.path": long_shards, "optim.lr": 0.003}}
    training.file.write_text(yaml.safe_dump(raw))
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(training.file)])
    assert ended.value.code == 1
    found = {run.state: run for run in records.runs(training.url.rsplit("/", 1)[0])}
    assert set(found) == {"failed", "finished"}
    assert found["failed"].url == training.url
    assert training.info()["reason"].startswith(f"{file}, row group {group}: {said}")
    file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(training.file)])
    assert ended.value.code == 0
    assert training.info()["state"] == "finished"
    assert len(read_info(found["finished"].url)["attempts"]) == 1  # it was left alone
    assert whole.command() == 0
    assert training.curves() == whole.curves()
