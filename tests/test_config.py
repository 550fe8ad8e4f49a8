import copy
import pickle

import pytest

from bgray.config import ConfigError
from bgray.document import read, set_path
from bgray.experiment import identity, load, read_overridden, resolve
from bgray.sweep_config import split_sweep

BASE = {
    "name": "x",
    "task": {"name": "unshift"},
    "model": {"name": "wav_unet"},
    "train": {"batch_size": 4},
}


def problems_of(change):
    """The problems that BASE has after {dotted path: value}, as {path: text}."""
    raw = copy.deepcopy(BASE)
    for path, value in change.items():
        set_path(raw, path, value)
    with pytest.raises(ConfigError) as caught:
        resolve(raw, "file.yaml")
    return dict(caught.value.problems)


def test_everything_but_task_and_model_has_defaults():
    experiment = resolve({"task": "unshift", "model": "wav_unet"}, "file.yaml")
    assert experiment.train.steps == 10_000
    assert experiment.optim.name == "muon"
    assert {name: p.options["weight"] for name, p in experiment.loss.items()} == {
        "multi_mel": 1.0,
        "l1": 10.0,
    }
    assert experiment.model.options["kernels"] == [7, 23, 41]


@pytest.mark.parametrize(
    ("change", "path", "text"),
    [
        ({"model.widht": 3}, "model.widht", "unknown key 'widht'"),
        ({"model.kernel": [7]}, "model.kernel", "did you mean 'kernels'?"),
        ({"trian": {}}, "trian", "unknown key, did you mean 'train'?"),
        ({"train.step": 5}, "train.step", "unknown key, did you mean 'steps'?"),
        ({"optim": {"name": "muon", "lr": "1e-4"}}, "optim.lr", "write 1.0e-4: YAML reads 1e-4"),
        ({"train.steps": "many"}, "train.steps", "expected int, got 'many'"),
        ({"train.steps": 0}, "train.steps", "must be >= 1, got 0"),
        ({"model.kernels": 7}, "model.kernels", "expected list, got 7"),
        ({"model.kernels": [7.5]}, "model.kernels[0]", "got 7.5"),
        ({"model.name": "wavunet"}, "model.name", "did you mean 'wav_unet'?"),
        ({"task": {"name": "tidy"}}, "task.name", "unknown name 'tidy'; there is unshift"),
        ({"loss": {"l2": 1}}, "loss.l2", "unknown name 'l2'; there is l1, mse"),
        ({"loss": {"l1": "a lot"}}, "loss.l1", "expected float, got 'a lot'"),
        ({"loss": {"mrstft": {"n_bin": 3}}}, "loss.mrstft.n_bin", "unknown key"),
        ({"optim": {"name": "sdg"}}, "optim.name", "unknown name"),
        ({"train.precision": "fp8"}, "train.precision", "'fp32', 'tf32' or 'bf16', got 'fp8'"),
        ({"data.segment": 1000}, "data.segment", "multiple of 512"),
        ({"validation.segment": 1000}, "validation.segment", "use 512 or 1024"),
        ({"runtime.workers": 3}, "train.batch_size", "4 is not divisible by runtime.workers = 3"),
        (
            {"data.segment": 512},
            "loss.multi_mel",
            "fails on examples of shape (S, C, T) = (1, 1, 512)",
        ),
        ({"data.augment": [{"name": "gian"}]}, "data.augment[0].name", "did you mean 'gain'?"),
        ({"runtime.gpus": 0.5, "runtime.workers": 2}, "runtime.gpus", "DDP ranks cannot share"),
    ],
)
def test_each_mistake_is_named_with_its_path_and_a_remedy(change, path, text):
    assert text in problems_of(change)[path]


def test_lists_that_do_not_fit_together_are_refused_with_the_level():
    found = problems_of({"model.scale_vs_channels": [1, 1, 2, 2]})
    (text,) = [text for path, text in found.items() if path == "model.scale_vs_channels"]
    assert "512" in text


def test_all_problems_of_a_file_come_in_one_error():
    found = problems_of({"train.steps": "x", "model.widht": 1, "optim.lr": -1.0, "loss": {"l2": 1}})
    assert {"train.steps", "model.widht", "optim.lr", "loss.l2"} <= set(found)


def test_missing_sections_name_their_choices():
    with pytest.raises(ConfigError, match="model: missing; write model: {name: ...}") as caught:
        resolve({"task": "unshift"}, "file.yaml")
    assert "wav_unet" in str(caught.value)


def test_an_unknown_key_does_not_hide_that_the_file_is_named():
    with pytest.raises(ConfigError, match="^file.yaml:\n  train.step: "):
        resolve({**BASE, "train": {"step": 1}}, "file.yaml")


def test_config_errors_survive_pickling_between_processes():
    error = ConfigError("a.yaml", [("x", "is wrong")])
    assert str(pickle.loads(pickle.dumps(error))) == "a.yaml:\n  x: is wrong"


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "kernels.yaml").write_text("task: unshift")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*kernels\.yaml"):
        read(str(tmp_path / "kernel.yaml"))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\tx: 1"])
def test_what_is_not_a_yaml_mapping_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML|expected `key: value` lines"):
        read(str(tmp_path / "x.yaml"))


def test_overrides_reach_nested_keys_and_are_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("model: {name: wav_unet, kernels: [41]}")
    sets = ("model.kernels=[7,23,41]", "train.steps=5", "data.path=a b")
    raw = read_overridden(str(tmp_path / "x.yaml"), sets)
    assert raw["model"] == {"name": "wav_unet", "kernels": [7, 23, 41]}
    assert raw["train"] == {"steps": 5}
    assert raw["data"] == {"path": "a b"}


@pytest.mark.parametrize("item", ["train.steps", "=3", "name.deeper=1"])
def test_overrides_that_cannot_be_applied_say_which(tmp_path, item):
    (tmp_path / "x.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=f"--set {item}"):
        read_overridden(str(tmp_path / "x.yaml"), (item,))


def test_the_id_follows_the_config_but_not_runtime_name_or_the_datas_place():
    def of(**change):
        raw = copy.deepcopy(BASE)
        for path, value in change.items():
            set_path(raw, path.replace("__", "."), value)
        return identity(resolve(raw, "f"))

    base = of()
    assert len(base) == 12
    assert of(runtime__compile=True) == of(name="other") == base
    assert of(train__seed=1) != base
    assert of(model__kernels=[7, 23, 41]) == base  # the default, written out
    assert of(data__builtin_songs=12) != base
    a = resolve(BASE, "f")
    assert a.identity("hash") == a.identity("hash") != a.identity("other data")


def test_a_resolved_config_reads_back_as_itself():
    experiment = resolve({**BASE, "data": {"augment": [{"name": "gain"}]}}, "f")
    again = resolve(experiment.resolved(), "f")
    assert again == experiment


def test_sweep_keys_are_kept_apart_and_checked():
    sweep = split_sweep({**BASE, "search": {"optim.lr": [1, 2]}, "samples": 3}, "f")
    assert sweep.samples == 3
    assert "search" not in sweep.base
    with pytest.raises(ConfigError, match="asha.grace_steps: missing"):
        split_sweep({**BASE, "asha": {}}, "f")


def test_a_part_of_the_default_loss_is_changed_within_it(tmp_path):
    (tmp_path / "x.yaml").write_text("task: unshift\nmodel: wav_unet")
    loss = load(str(tmp_path / "x.yaml"), ("loss.l1=5",)).loss
    assert {name: p.options["weight"] for name, p in loss.items()} == {"multi_mel": 1, "l1": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("task: unshift\ntask: unshift", "the key 'task' is written twice"),
        ("task: {name: [unshift]}\nmodel: wav_unet", "expected {name: ...}"),
        ("task: unshift\nmodel: wav_unet\ntrain: &t {steps: *t}", "refers to itself"),
        ("task: unshift\nmodel: wav_unet\nname: ../../etc", "letters, digits"),
        ("task: unshift\nmodel: wav_unet\ntrain: {seed: 99999999999999999999}", "train.seed"),
        ("task: unshift\nmodel: wav_unet\nloss: {l1: .nan}", "above 0 and finite"),
        ("task: unshift\nmodel: wav_unet\nloss: {l1: -1}", "above 0 and finite"),
        (
            "task: unshift\nmodel: wav_unet\nschedule: {name: wsd, warmup_steps: 100000}",
            "schedule",
        ),
        ("task: unshift\nmodel: wav_unet\nruntime: {results: 'gs://x'}", "start with s3://"),
        ("task: unshift\nmodel: wav_unet\nruntime: {gpus: 1.5}", "whole number above 1"),
        ("task: unshift\nmodel: wav_unet\ndata: {segment: 99999999999}", "data.segment"),
    ],
)
def test_odd_yaml_ends_in_a_message_and_not_in_a_traceback(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "x.yaml"))
    assert message in str(caught.value)


def test_a_folder_is_no_experiment(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        read(str(tmp_path))


def test_a_seed_of_sixty_three_bits_is_a_seed():
    seed = 2**63 - 1
    assert resolve({**BASE, "train": {"seed": seed, "batch_size": 4}}, "f").train.seed == seed
