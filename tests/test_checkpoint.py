import hashlib
import os

import pytest
import torch

from bgray import checkpoint, storage
from bgray.config import ConfigError


@pytest.fixture(params=["local", "s3"])
def run_url(request, tmp_path):
    root = request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)
    return storage.join(root, "run")


@pytest.fixture
def _no_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_AGAIN_SECONDS", (0.0, 0.0))


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


@pytest.mark.usefixtures("_no_pauses")
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


POINTER = "checkpoint/latest"
FILE = "checkpoint/step-00000004.pt"


def test_the_pointer_names_the_file_its_bytes_and_their_hash(run_url):
    checkpoint.save(run_url, 4, state(4))
    data = storage.read_bytes(storage.join(run_url, FILE))
    expected = f"step-00000004.pt {len(data)} {hashlib.sha256(data).hexdigest()}"
    assert storage.read_bytes(storage.join(run_url, POINTER)).decode() == expected


def test_a_pointer_of_older_versions_has_the_name_only_and_still_loads(run_url):
    checkpoint.save(run_url, 4, state(4))
    storage.write_bytes(storage.join(run_url, POINTER), b"step-00000004.pt\n")
    assert checkpoint.load(run_url)["step"] == 4


@pytest.mark.parametrize("text", ["", "step-0000", "../../other/step-00000004.pt", "\xff"])
def test_a_pointer_that_names_no_checkpoint_is_quoted(tmp_path, text):
    checkpoint.save(str(tmp_path), 4, state(4))
    (tmp_path / POINTER).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="names no checkpoint: .*delete the folder"):
        checkpoint.load(str(tmp_path))


def spoil(data, how):
    """Cut, or with one bit turned."""
    return data[:-100] if how == "cut" else data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.usefixtures("_no_pauses")
@pytest.mark.parametrize("how", ["cut", "bit"])
def test_a_state_that_was_read_wrongly_is_read_again(tmp_path, monkeypatch, how):
    checkpoint.save(str(tmp_path), 4, state(4))
    read, reads = storage.read_bytes, []

    def spoils(url):
        if not url.endswith(".pt"):
            return read(url)
        reads.append(url)
        return spoil(read(url), how) if len(reads) < 3 else read(url)

    monkeypatch.setattr(storage, "read_bytes", spoils)
    assert checkpoint.load(str(tmp_path))["step"] == 4
    assert len(reads) == 3


@pytest.mark.usefixtures("_no_pauses")
def test_a_state_that_stays_wrong_says_what_is_there_and_what_was_written(tmp_path):
    checkpoint.save(str(tmp_path), 4, state(4))
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(spoil(whole, "cut"))
    with pytest.raises(ConfigError, match=f"{len(whole) - 100} bytes there, {len(whole)} written"):
        checkpoint.load(str(tmp_path))
    path.write_bytes(spoil(whole, "bit"))
    with pytest.raises(ConfigError, match=r"sha256 \w{12} there, \w{12} written"):
        checkpoint.load(str(tmp_path))


@pytest.mark.usefixtures("_no_pauses")
def test_a_state_that_goes_while_it_is_read_gives_way_to_the_one_after_it(tmp_path, monkeypatch):
    checkpoint.save(str(tmp_path), 4, state(4))
    read = storage.read_bytes

    def overtaken(url):
        if url.endswith("step-00000004.pt"):
            checkpoint.save(str(tmp_path), 8, state(8))
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", overtaken)
    assert checkpoint.load(str(tmp_path))["step"] == 8


def test_a_state_that_arrives_short_is_written_again_before_the_pointer_is(s3, monkeypatch):
    url = storage.join(s3, "run")
    checkpoint.save(url, 4, state(4))
    write, cuts = storage.write_bytes, []

    def loses(times):
        def put(target, data):
            cut = target.endswith(".pt") and len(cuts) < times
            write(target, data[:-10] if cut else data)
            cuts.extend([target] * cut)

        return put

    monkeypatch.setattr(storage, "write_bytes", loses(1))
    checkpoint.save(url, 8, state(8))
    assert checkpoint.load(url)["step"] == 8
    monkeypatch.setattr(storage, "write_bytes", loses(3))
    with pytest.raises(OSError, match="bytes arrived of") as caught:
        checkpoint.save(url, 12, state(12))
    assert caught.value.filename.endswith("checkpoint/step-00000012.pt")
    assert checkpoint.load(url)["step"] == 8


def test_a_newer_state_of_another_process_is_left_alone(run_url):
    checkpoint.save(run_url, 12, state(12))
    checkpoint.save(run_url, 8, state(8))
    folder = storage.join(run_url, "checkpoint")
    assert storage.listdir(folder) == ["latest", "step-00000008.pt", "step-00000012.pt"]


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


# --- the best


def files(url):
    return storage.listdir(storage.join(url, "checkpoint"))


def best(url):
    found = checkpoint.load(url, which="best")
    return found and found["step"]


def test_the_best_state_is_kept_beside_the_latest_and_no_third_one(run_url):
    assert best(run_url) is None
    for step, score in ((4, "val=3.0"), (8, "val=2.0"), (12, ""), (16, ""), (20, "val=1.5")):
        checkpoint.save(run_url, step, state(step), score)
        assert len([name for name in files(run_url) if name.endswith(".pt")]) <= 2
        if step == 16:
            assert (best(run_url), checkpoint.load(run_url)["step"]) == (8, 16)
            assert files(run_url) == ["best", "latest", "step-00000008.pt", "step-00000016.pt"]
    assert files(run_url) == ["best", "latest", "step-00000020.pt"]
    pointer = storage.read_bytes(storage.join(run_url, "checkpoint/best")).decode()
    latest = storage.read_bytes(storage.join(run_url, "checkpoint/latest")).decode()
    assert pointer == f"{latest} val=1.5"


@pytest.mark.parametrize("writes", range(4))
def test_whichever_write_a_kill_falls_on_both_pointers_have_their_states(
    tmp_path, monkeypatch, writes
):
    url = str(tmp_path)
    checkpoint.save(url, 4, state(4), "val=3.0")
    checkpoint.save(url, 8, state(8))
    write, left = storage.write_bytes, iter(range(writes))

    def dies(target, data):
        if next(left, None) is None:
            raise OSError("killed")
        write(target, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", dies)
        if writes < 3:
            with pytest.raises(OSError, match="killed"):
                checkpoint.save(url, 12, state(12), "val=2.0")
        else:
            checkpoint.save(url, 12, state(12), "val=2.0")
    latest = checkpoint.load(url)["step"]
    assert (latest, best(url)) == ((8, 4), (8, 4), (12, 4), (12, 12))[writes]
    # What the next start does: the best evaluation up to the latest state.
    checkpoint.settle_best(url, (12, 2.0) if latest == 12 else (4, 3.0), "val", latest)
    assert best(url) == (12 if latest == 12 else 4)
    assert checkpoint.best_step(url) == best(url)
    checkpoint.save(url, 16, state(16))
    names = [name for name in files(url) if name.endswith(".pt")]
    assert names == [f"step-{best(url):08d}.pt", "step-00000016.pt"]


def test_a_best_state_from_after_the_latest_one_does_not_count(tmp_path):
    url = str(tmp_path)
    checkpoint.save(url, 8, state(8), "val=2.0")
    checkpoint.settle_best(url, (2, 3.0), "val", 4)
    assert checkpoint.best_step(url) is None


@pytest.mark.parametrize("left", ["no pointer", "a damaged one", "a pointer to nothing"])
def test_where_the_best_state_is_gone_the_latest_takes_its_place_if_it_was_evaluated(run_url, left):
    folder = storage.join(run_url, "checkpoint")
    checkpoint.save(run_url, 8, state(8), "val=2.0")
    checkpoint.save(run_url, 12, state(12))
    if left == "a pointer to nothing":
        storage.remove(storage.join(folder, "step-00000008.pt"))
    elif left == "a damaged one":
        storage.write_bytes(storage.join(folder, "best"), b"?")
    else:
        storage.remove(storage.join(folder, "best"))
    assert checkpoint.best_step(run_url) is None
    checkpoint.settle_best(run_url, None, "val", 12)
    assert best(run_url) is None
    checkpoint.settle_best(run_url, (12, 3.0), "val", 12)
    assert checkpoint.best_step(run_url) == best(run_url) == 12


@pytest.mark.usefixtures("_no_pauses")
def test_a_best_state_that_cannot_be_read_costs_nothing_but_itself(tmp_path):
    url = str(tmp_path)
    checkpoint.save(url, 4, state(4), "val=3.0")
    checkpoint.save(url, 8, state(8))
    (tmp_path / "checkpoint/step-00000004.pt").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"delete .*/best; the latest state is another file"):
        checkpoint.load(url, which="best")
    (tmp_path / "checkpoint/best").write_bytes(b"?")
    checkpoint.save(url, 12, state(12))
    assert checkpoint.load(url)["step"] == 12
