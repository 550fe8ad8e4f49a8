"""Files of lines as curves: right, only what is asked for, and only what is new."""

import json
import math
import os

import numpy as np
import pytest

from bgray import curves, storage
from bgray.curves import Curves


def line(step, **values):
    return json.dumps({"step": step, **values}, separators=(",", ":")) + "\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path


def of(folder, budget=curves.BUDGET):
    """Curves of a folder, its files as they are now."""
    found = Curves(str(folder), budget)
    found.stamps = storage.stamps(str(folder))
    return found


def look(found, folder):
    found.stamps = storage.stamps(str(folder))
    return found.of("run", "metrics.jsonl")


def write(folder, text, name="metrics.jsonl"):
    (folder / "run" / name).write_text(text)


@pytest.fixture
def sizes(monkeypatch):
    """How many bytes each reading took."""
    taken = []
    real = curves.Columns._more

    def more(self, stamp):
        content = real(self, stamp)
        if content is not None:
            taken.append(len(content))
        return content

    def read(url):
        content = storage_read(url)
        taken.append(len(content))
        return content

    storage_read = storage.read_bytes
    monkeypatch.setattr(curves.Columns, "_more", more)
    monkeypatch.setattr(storage, "read_bytes", read)
    return taken


def test_each_name_has_its_own_steps(folder):
    write(
        folder,
        line(10, loss=2.0, grad_norm=1)
        + line(20, loss=1.5)
        + line(20, val={"val_stft": 0.5})
        + line(30, loss=1.25, late=3),
    )
    found = of(folder).of("run", "metrics.jsonl")
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in found.items()} == {
        "loss": ([10, 20, 30], [2.0, 1.5, 1.25]),
        "grad_norm": ([10], [1.0]),
        "late": ([30], [3.0]),
        "val_stft": ([20], [0.5]),
    }


def test_nan_and_null_are_points_without_a_value(folder):
    write(folder, line(1, loss=1.0) + '{"step":2,"loss":NaN}\n' + line(3, loss=None))
    write(folder, line(1, val={"a": None}) + '{"step":2,"val":{"a":NaN}}\n', "other.jsonl")
    steps, values = of(folder).of("run", "metrics.jsonl")["loss"]
    assert steps.tolist() == [1, 2, 3]
    assert [math.isnan(v) for v in values] == [False, True, True]
    steps, values = of(folder).of("run", "other.jsonl")["a"]
    assert steps.tolist() == [1, 2]
    assert np.isnan(values).all()


def test_fast_and_slow_reading_agree():
    rng = np.random.default_rng(0)
    content = b""
    for step in range(1, 300):
        values = {n: float(f"{v:.7g}") for n, v in zip("ab", rng.normal(size=2), strict=True)}
        if step % 7 == 0:
            values["a"] = math.nan
        if step % 11 == 0:
            values["c"] = 10**step if step < 100 else None
        content += line(step, **values, text="x").encode()
        if step % 50 == 0:
            content += line(step, val={"val_stft": 1 / step}).encode()
    fast, slow = curves.parsed(content), curves._line_by_line(content.split(b"\n"))
    assert fast.keys() == slow.keys() == {"a", "b", "c", "val_stft"}
    for name, (steps, values) in slow.items():
        np.testing.assert_array_equal(fast[name][0], steps)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(fast[name][1], values.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize(
    "rest", ['{"step":30,"loss":0.1', '{"st', '{"step":30,"val":{"val_stft":0']
)
def test_a_torn_last_line_is_left_out_and_read_once_it_is_whole(folder, rest):
    write(folder, line(10, loss=2.0) + line(20, loss=1.0) + rest)
    found = of(folder)
    assert found.of("run", "metrics.jsonl")["loss"][0].tolist() == [10, 20]
    write_more(folder, "\n" + line(40, loss=0.5))
    assert look(found, folder)["loss"][0].tolist() == [10, 20, 40]


def write_more(folder, text):
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_damaged_line_costs_only_itself(folder):
    write(folder, line(10, loss=2.0) + "oops\n[1]\n" + line(20, loss="x") + line(30, loss=1.0))
    assert of(folder).of("run", "metrics.jsonl")["loss"][0].tolist() == [10, 30]


def test_scores_are_read_without_the_lines_of_training(folder, monkeypatch):
    write(folder, line(10, loss=2.0) + line(10, val={"val_stft": 0.5}) + line(20, loss=1.0))
    monkeypatch.setattr(curves, "parsed", None)  # nobody may ask for it
    assert {k: v[1].tolist() for k, v in of(folder).scores("run").items()} == {"val_stft": [0.5]}


def test_of_a_growing_file_only_what_is_new_is_read(folder, sizes):
    write(folder, line(10, loss=2.0) * 1000)
    found = of(folder)
    look(found, folder)
    news = line(20, loss=1.0) + line(20, val={"val_stft": 0.25})
    write_more(folder, news)
    del sizes[:]
    after = look(found, folder)
    assert sizes == [len(news)]
    assert len(after["loss"][0]) == 1001
    assert after["loss"][1][-1] == 1.0
    assert after["val_stft"][1].tolist() == [0.25]
    del sizes[:]
    look(found, folder)
    assert sizes == []


def test_a_curve_that_was_handed_out_does_not_change(folder):
    write(folder, line(10, loss=2.0))
    found = of(folder)
    before = look(found, folder)
    write_more(folder, line(20, loss=1.0, other=1.0))
    look(found, folder)
    assert {name: len(x) for name, (x, _) in before.items()} == {"loss": 1}


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_run_that_goes_on_from_an_earlier_step_is_read_anew(folder, how):
    write(folder, "".join(line(step, loss=1.0) for step in range(1, 50)))
    found = of(folder)
    look(found, folder)
    text = "".join(line(step, loss=2.0) for step in range(1, 200))
    if how == "another file":
        write(folder, text, "new")
        os.replace(folder / "run" / "new", folder / "run" / "metrics.jsonl")
    else:
        write(folder, text)
    steps, values = look(found, folder)["loss"]
    assert len(steps) == 199
    assert set(values.tolist()) == {2.0}


def test_another_file_that_ends_where_the_old_one_did_is_read_anew(folder):
    """As when a run goes on from an earlier step and logs the same last lines once more."""
    same = "".join(line(step, loss=1.0) for step in range(20, 50))
    assert len(same) > curves.TAIL
    write(folder, "".join(line(step, loss=3.0) for step in range(10, 20)) + same)
    found = of(folder)
    assert look(found, folder)["loss"][1].max() == 3.0
    write(folder, "".join(line(step, loss=2.0) for step in range(10, 20)) + same, "new")
    with (folder / "run" / "new").open("a") as file:
        file.write(line(50, loss=0.5))
    os.replace(folder / "run" / "new", folder / "run" / "metrics.jsonl")
    steps, values = look(found, folder)["loss"]
    assert steps.tolist() == list(range(10, 51))
    assert values.tolist() == [2.0] * 10 + [1.0] * 30 + [0.5]


def test_a_file_that_is_gone_has_no_curves(folder):
    write(folder, line(10, loss=2.0))
    found = of(folder)
    stamps = found.stamps
    look(found, folder)
    (folder / "run" / "metrics.jsonl").unlink()
    write(folder, "", "x")
    assert look(found, folder) == {}
    again = Curves(str(folder))
    again.stamps = stamps  # it went between the listing and the reading
    assert again.of("run", "metrics.jsonl") == {}
    assert again.last_step("run", "metrics.jsonl") == 0
    assert again.names(["run"]) == []


def test_the_last_step_is_that_of_the_last_whole_line(folder):
    many = "".join(line(step, train_seconds=step / 3) for step in range(5000))
    write(folder, many + '{"step":70', "timing.jsonl")
    assert of(folder).last_step("run", "timing.jsonl") == 4999
    assert of(folder).last_step("run", "no.jsonl") == 0


def test_names_are_those_of_all_runs(folder):
    (folder / "other").mkdir()
    write(folder, line(1, loss=1.0, loss_l1=1.0) + line(1, val={"val_stft": 1.0}))
    (folder / "other" / "metrics.jsonl").write_text(line(1, loss=1.0, loss_mel=1.0))
    assert of(folder).names(["none", "run", "other"]) == ["loss", "loss_l1", "loss_mel"]


def test_names_come_with_the_first_line(folder):
    write(folder, '{"step":1,"lo')
    found = of(folder)
    assert found.names(["run"]) == []
    write_more(folder, 'ss":1.0}\n')
    found.stamps = storage.stamps(str(folder))
    assert found.names(["run"]) == ["loss"]


def test_memory_is_bounded_and_what_was_given_up_is_read_again(folder):
    text = "".join(line(step, loss=1 / step) for step in range(1, 1001))
    for run in "abc":
        (folder / run).mkdir()
        (folder / run / "metrics.jsonl").write_text(text)
    found = of(folder, budget=30_000)  # one run has 12 kB
    for run in "abcabc":
        assert len(found.of(run, "metrics.jsonl")["loss"][0]) == 1000
        assert sum(columns.size for columns in found._columns.values()) <= 30_000
    assert len(found._columns) == 2


def test_on_s3_a_file_is_fetched_once_for_scores_and_training(s3, sizes):
    url = f"{s3}/sweep"
    text = line(10, loss=2.0) + line(10, val={"val_stft": 0.5}) + line(20, loss=1.0)
    storage.write_bytes(f"{url}/run/metrics.jsonl", text.encode())
    found = of(url)
    assert found.scores("run")["val_stft"][1].tolist() == [0.5]
    found.fetch(["run"], "metrics.jsonl")
    assert found.of("run", "metrics.jsonl")["loss"][1].tolist() == [2.0, 1.0]
    assert sizes == [len(text)]
    assert found.last_step("run", "metrics.jsonl") == 20
    assert found.names(["run"]) == ["loss"]
    storage.write_bytes(f"{url}/run/metrics.jsonl", (text + line(30, loss=0.5)).encode())
    found.stamps = storage.stamps(url)
    assert found.of("run", "metrics.jsonl")["loss"][1].tolist() == [2.0, 1.0, 0.5]
    assert found.last_step("run", "metrics.jsonl") == 30
