"""Tables say the same in the same digits wherever they are."""

import io
import json

import pytest
from rich.console import Console

from bgray import cells, storage
from bgray.reading import Reader
from bgray.specimen import Made, make


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("cells") / "sweep")
    variants = [
        Made("baseline"),
        Made("better", {"model.kernels": [7]}, gain=0.1, vram_gib=11.125, parameters=407_000),
        Made("on the CPU", {"optim.lr": 1.0}, vram_gib=None),
        Made("lost", state="out_of_memory", until=10),
        Made("later", state="waiting"),
    ]
    make(url, variants, seeds=2, steps=200, items=6, clips=0)
    return Reader(url).read()


def of(results, label):
    return cells.of(results, next(e for e in results.entries if e.label == label))


def test_the_cells_are_the_words_of_the_compare_commands_table(results):
    for metric, comparison in results.comparisons.items():
        out = io.StringIO()
        Console(file=out, width=400).print(comparison.table())
        lines = [[part.strip() for part in line.split("│")] for line in out.getvalue().split("\n")]
        table = {line[1]: line for line in lines if len(line) > 6}
        for entry in results.entries:
            said, line = cells.of(results, entry), table[entry.label]
            assert said["seeds"] == line[2]
            assert said["step"] == line[3]
            assert said[metric] == line[4]
            assert said[f"{metric} difference"] == line[5]
            if metric == results.metric:
                assert said["verdict"] == line[7]


def test_the_baselines_value_stands_beside_the_difference(results):
    said = of(results, "better")
    mean, difference = said["val_stft"].split()[0], said["val_stft difference"].split()[0]
    assert float(mean) - float(difference) == pytest.approx(
        float(said["val_stft baseline"]), abs=1.5e-4
    )
    assert of(results, "baseline")["val_stft baseline"] == "-"
    assert of(results, "baseline")["verdict"] == "baseline"


def test_the_baselines_value_is_of_the_items_that_both_have(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a"), Made("b", {"optim.lr": 1.0})], seeds=2, steps=50, items=4, clips=0)
    for entry in Reader(url).read().entries:
        last = None if entry.label == "a" else 30.0
        line = {"step": 50, "val_stft": [10.0, 11.0, 12.0, last], "val_si_sdr": [1.0] * 4}
        for trial in entry.trials:
            text = json.dumps(line) + "\n"
            storage.write_bytes(f"{trial.url}/validation_items.jsonl", text.encode())
    results = Reader(url).read()
    said = of(results, "b")
    assert said["val_stft baseline"] == of(results, "a")["val_stft"].split()[0] == "11.0000"
    assert said["val_stft difference"].startswith("+0.0000")
    assert of(results, "a")["val_stft baseline"] == "-"
    own, row = results.comparisons["val_stft"].to_json()["rows"]
    assert (own["baseline_mean"], row["baseline_mean"]) == (None, 11.0)
    assert row["mean"] == 15.75  # of all the variant's own items


@pytest.mark.parametrize(
    ("label", "column", "text"),
    [
        ("better", "vram", "11.12 GiB"),
        ("better", "parameters", "407k"),
        ("better", "changes", "kernels [41] → [7]"),
        ("better", "to_10k", "~40 min"),
        ("better", "wait", "12%"),
        ("better", "states", "2 finished"),
        ("baseline", "parameters", "15.67M"),
        ("baseline", "changes", "-"),
        ("on the CPU", "vram", "CPU"),
        ("lost", "states", "1 finished, 1 out of memory"),
        ("later", "vram", "-"),
        ("later", "to_10k", "-"),
        ("later", "states", "2 waiting"),
        ("later", "val_stft", "-"),
    ],
)
def test_what_a_cell_says(results, label, column, text):
    assert of(results, label)[column] == text


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"finished": 1}, "finished"),
        ({"finished": 2, "out_of_memory": 1}, "2 finished, 1 out of memory"),
        ({"stopped": 0}, "-"),
    ],
)
def test_states_are_counted_where_there_are_several(counts, text):
    assert cells.states(counts) == text


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["model.kernels", "optim.lr"], ["kernels", "lr"]),
        (["loss.l1.weight", "loss.mel.weight"], ["loss.l1", "loss.mel"]),
        (["loss.l1.weight", "model.l1"], ["loss.l1", "model.l1"]),
        (["model.a.width", "model.b.width"], ["a.width", "b.width"]),
        (["model.a.x.width", "task.b.x.width"], ["a.x.width", "b.x.width"]),
        (["model.name", "name"], ["model.name", "name"]),
        (["optim.name", "optim.lr"], ["optim.name", "lr"]),
        (["loss.l1", "loss.l1.weight"], ["loss.l1", "loss.l1.weight"]),
    ],
)
def test_settings_are_called_by_as_many_words_as_tell_them_apart(keys, names):
    assert list(cells.setting_names(keys).values()) == names


def test_changes_of_two_losses_weights_are_told_apart(tmp_path):
    url = str(tmp_path / "sweep")
    first = Made("base", {"loss.mel.weight": 1.0})
    other = Made("v", {"loss.l1.weight": 5.0, "loss.mel.weight": 2.0})
    make(url, [first, other], seeds=1, steps=20, items=2, clips=0)
    assert of(Reader(url).read(), "v")["changes"] == "loss.l1 10 → 5, loss.mel 1 → 2"
