import os

import pytest
import torch

from bgray import checkpoint, storage
from bgray.config import ConfigError


@pytest.fixture(params=["local", "s3"])
def run_url(request, tmp_path):
    root = request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)
    return storage.join(root, "run")


def state(step):
    return {"model": {"w": torch.full((3,), float(step))}, "step": step, "sums": {}, "text": ["a"]}


def test_the_newest_state_is_loaded_and_older_ones_are_deleted(run_url):
    assert checkpoint.load(run_url) is None
    for step in (4, 8, 12):
        checkpoint.save(run_url, step, state(step))
    found = checkpoint.load(run_url)
    assert (found["step"], found["text"]) == (12, ["a"])
    assert found["model"]["w"].tolist() == [12.0, 12.0, 12.0]
    folder = storage.join(run_url, "checkpoint")
    assert storage.listdir(folder) == ["latest", "step-00000012.pt"]


@pytest.mark.parametrize("dies_at", ["step-00000008.pt", "latest"])
def test_a_crash_before_the_pointer_is_written_leaves_the_older_state(
    run_url, monkeypatch, dies_at
):
    checkpoint.save(run_url, 4, state(4))
    write = storage.write_bytes

    def dies(url, data):
        if url.endswith(dies_at):
            raise OSError("the machine is gone")
        write(url, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", dies)
        with pytest.raises(OSError, match="the machine is gone"):
            checkpoint.save(run_url, 8, state(8))
    assert checkpoint.load(run_url)["step"] == 4


def test_old_states_that_cannot_be_deleted_do_not_fail_the_run(tmp_path, monkeypatch):
    def refuses(url):
        raise PermissionError(url)

    monkeypatch.setattr(storage, "remove", refuses)
    for step in (4, 8):
        checkpoint.save(str(tmp_path), step, state(step))
    assert checkpoint.load(str(tmp_path))["step"] == 8


@pytest.mark.parametrize("broken", ["cut short", "not a checkpoint", "missing"])
def test_a_state_that_cannot_be_read_names_the_folder_to_delete(run_url, broken):
    checkpoint.save(run_url, 4, state(4))
    path = storage.join(run_url, "checkpoint", "step-00000004.pt")
    whole = storage.read_bytes(path)
    if broken == "missing":
        storage.remove(path)
    else:
        storage.write_bytes(path, whole[: len(whole) // 2] if broken == "cut short" else b"hello")
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(run_url)
    assert path in str(caught.value)
    assert f"delete the folder {run_url}/checkpoint to start from step 0" in str(caught.value)


def test_storage_that_does_not_answer_is_no_reason_to_delete_a_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(str(tmp_path), 4, state(4))
    read = storage.read_bytes

    def times_out(url):
        if url.endswith(".pt"):
            raise TimeoutError("the bucket does not answer")
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", times_out)
    with pytest.raises(TimeoutError, match="does not answer"):
        checkpoint.load(str(tmp_path))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    folder, url = str(tmp_path / "pwned"), str(tmp_path / "run")
    checkpoint.save(url, 4, {"step": 4, "bomb": Bomb(folder)})
    with pytest.raises(ConfigError, match="weights_only|cannot be read"):
        checkpoint.load(url)
    assert not os.path.exists(folder)
