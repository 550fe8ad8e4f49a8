import dataclasses
import json
import re
import shutil

import pytest
import torch

from bgray import build, shards, storage
from bgray.build import TABLES
from bgray.config import ConfigError
from bgray.experiment import build_recipe, describe, identity, prepare_data, resolve, run_url


@pytest.mark.parametrize("name", TABLES["optim"])
def test_every_optimizer_in_the_table_changes_the_weights_within_two_steps(tiny, name):
    experiment = resolve({**tiny, "optim": name}, "test")
    torch.manual_seed(0)
    model = build.build_model(experiment)
    optimizer = build.build_optimizer(experiment, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):  # SOAP's first one only measures
        # As large as in training; heavyball refuses gradients below 1e-8.
        (1e6 * model(torch.randn(2, 1, 512)).square().mean()).backward()
        optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > 0.9 * len(before)


@pytest.mark.parametrize("name", TABLES["schedule"])
def test_every_schedule_in_the_table_scales_a_middle_step_by_at_most_1(tiny, name):
    scale = build.build_schedule(resolve({**tiny, "schedule": name}, "test")).scale
    assert 0 < scale(50, 100) <= 1


@pytest.mark.parametrize("name", TABLES["augment"])
def test_every_augmentation_in_the_table_reaches_the_recipe_with_its_defaults(tiny, name):
    tiny["data"]["augment"] = [{"name": name}]
    experiment = resolve(tiny, "test")
    recipe = build_recipe(experiment, prepare_data(experiment))
    assert recipe.augment == (TABLES["augment"][name](),)


MODELS_FOR = {
    "unshift": ("wav_unet", "spec_unet"),
    "deartifact": ("wav_unet", "spec_unet"),
    "separation": ("conv_separator", "gru_separator", "wave_unet", "wavenet", "open_unmix"),
    "pianoroll": ("roll_autoencoder", "roll_rnn"),
}


@pytest.mark.parametrize(
    ("task", "model"), [(task, model) for task, models in MODELS_FOR.items() for model in models]
)
def test_every_task_resolves_with_its_models_by_name_alone(task, model):
    found = resolve({"task": task, "model": model}, "test")
    assert (found.task.name, found.model.name) == (task, model)


def test_every_task_and_model_has_a_partner():
    assert MODELS_FOR.keys() == TABLES["task"].keys()
    assert {m for models in MODELS_FOR.values() for m in models} == TABLES["model"].keys()


# --- describe


def test_describe_prints_numbers_that_can_be_checked_by_hand(tiny):
    tiny["data"]["segment"], tiny["train"]["batch_size"] = 512, 6
    tiny["train"]["steps"] = 600
    experiment = resolve(tiny, "test")
    found = json.loads(json.dumps(describe(experiment)))
    assert found["id"] == identity(experiment)
    assert found["input_shape"] == [6, 1, 512]
    assert found["target_shape"] == [6, 1, 1, 512]
    assert found["validation_shape"] == [1, 1, 4096]
    # 6 examples of 512 samples, one channel, input and one target, 2 bytes each.
    assert found["bytes_per_batch"] == 6 * 512 * 2 * 2 == 12_288
    assert found["seconds_of_audio_per_step"] == 0.384  # 3072 / 8000
    assert found["hours_of_audio"] == 0.06  # 600 * 0.384 / 3600 = 0.064
    model = build.build_model(experiment)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["experiment"] == experiment.resolved()


def test_the_meta_model_has_no_memory_and_as_many_parameters(tiny):
    experiment = resolve(tiny, "test")
    meta = build.meta_model(experiment)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert build.num_parameters(meta) == build.num_parameters(build.build_model(experiment))


def test_the_resolved_experiment_reads_back_as_itself_and_builds_the_same_weights(tiny):
    tiny["data"]["augment"] = [{"name": "gain", "low_db": -3.0}]
    tiny["loss"] = {"l1": 2.0, "multi_mel": {"weight": 0.5}}
    tiny["data"]["segment"] = 4096
    first = resolve(tiny, "test")
    again = resolve(json.loads(json.dumps(first.resolved())), "test")
    assert again == first
    states = []
    for experiment in (first, again):
        torch.manual_seed(0)
        states.append(build.build_model(experiment).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_the_id_ignores_runtime_name_and_place_and_follows_everything_else(tiny, tmp_path):
    base = resolve(tiny, "test")
    moved = tmp_path / "moved"
    shutil.copytree(tiny["data"]["path"], moved)
    same = [
        {**tiny, "name": "other"},
        {**tiny, "runtime": {**tiny["runtime"], "threads": 2, "log_every": 5}},
        {**tiny, "data": {**tiny["data"], "path": str(moved)}},
    ]
    assert {identity(resolve(raw, "test")) for raw in same} == {identity(base)}
    other = [
        {**tiny, "train": {**tiny["train"], "seed": 1}},
        {**tiny, "validation": {**tiny["validation"], "items": 3}},
        {**tiny, "loss": {"l1": 2.0}},
    ]
    assert len({identity(resolve(raw, "test")) for raw in other} | {identity(base)}) == 4
    assert run_url(base) == f"{tiny['runtime']['results']}/tiny/{identity(base)}"


# --- data that does not fit


def problems(tiny, **data):
    task = data.pop("task", {})
    raw = {**tiny, "data": {**tiny["data"], **data}, "task": {**tiny["task"], **task}}
    with pytest.raises(ConfigError) as caught:
        prepare_data(resolve(raw, "test"))
    return str(caught.value)


def test_shards_of_another_rate_are_refused_with_both_ways_out(tiny):
    text = problems(tiny, sample_rate=16000)
    assert "data.sample_rate: the shards have 8000 Hz, the experiment asks for 16000" in text
    assert "set data.sample_rate=8000, or write shards with --sample-rate 16000" in text


def test_shards_of_another_number_of_channels_are_refused(tiny):
    assert "data.channels: the shards have 1, the experiment asks for 2" in problems(
        tiny, channels=2
    )


def test_a_missing_shift_column_is_named_with_the_option_that_writes_it(tiny):
    text = problems(tiny, task={"semitones": 7.0})
    assert "the shards have no column 'shift_7' (there is audio, shift_12)" in text
    assert "write them with --shift 7, or set task.shift=on_the_fly" in text


def test_all_that_does_not_fit_is_told_at_once(tiny):
    text = problems(tiny, sample_rate=16000, channels=2, task={"semitones": 7.0})
    assert len(text.splitlines()) == 4


def test_a_folder_without_shards_is_refused_with_the_command_that_makes_them(tiny, tmp_path):
    text = problems(tiny, path=str(tmp_path))
    assert f"make them with: python -m bgray.shards SOURCE {tmp_path}" in text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_refused(tiny, tmp_path, split):
    manifest = shards.read_manifest(tiny["data"]["path"])
    kept = tuple(shard for shard in manifest.shards if shard.split != split)
    changed = dataclasses.replace(manifest, shards=kept)
    storage.write_bytes(str(tmp_path / "manifest.json"), changed.to_json())
    assert f"data.path: no {split} chunks in the manifest" in problems(tiny, path=str(tmp_path))


# --- sections that do not fit together


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"segment": 515}, r"data\.segment: 515 samples is not a multiple of \d+, .*use 5"),
        ("validation", {"segment": 4097}, r"validation\.segment: 4097 samples is not a multiple"),
        ("runtime", {"workers": 3}, "train.batch_size: 4 is not divisible by runtime.workers = 3"),
        ("runtime", {"workers": 2, "gpus": 0.5}, "runtime.gpus: must be 1 or more"),
        ("loss", {"mrstft": 1.0}, r"loss\.mrstft: fails on examples of .* \(1, 1, 16\)"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused_before_anything_starts(
    tiny, section, change, message
):
    tiny[section] = {**tiny[section], **change}
    if section == "loss":
        tiny["data"]["segment"] = 16
    with pytest.raises(ConfigError, match=message):
        resolve(tiny, "test")


def test_only_the_sum_of_the_weighted_losses_changes_with_a_weight(tiny):
    x, y = torch.full((1, 1, 1, 512), 0.5), torch.zeros(1, 1, 1, 512)
    total, parts = build.build_loss(resolve({**tiny, "loss": {"l1": 3.0}}, "test"))(x, y)
    assert total.item() == pytest.approx(1.5)
    assert parts["l1"].item() == pytest.approx(0.5)


# --- presets, and what sections demand of each other


def test_a_preset_is_what_the_log_used_and_can_be_changed_in_part(tiny):
    found = resolve({**tiny, "optim": {"preset": "muon_001", "adamw_lr": 1e-4}}, "test").optim
    assert found.name == "muon"
    assert (found.options["lr"], found.options["adamw_lr"]) == (2e-3, 1e-4)
    assert found.options["legacy_ndim"] is True


@pytest.mark.parametrize(
    ("optim", "text"),
    [
        ({"preset": "muon_01"}, r"optim.preset: .*did you mean 'muon_001'"),
        ({"preset": "muon_001", "name": "muon"}, "a name or a preset"),
    ],
)
def test_a_preset_that_is_not_there_or_not_alone_is_refused(tiny, optim, text):
    with pytest.raises(ConfigError, match=text):
        resolve({**tiny, "optim": optim}, "test")


ROLL = {"task": {"name": "pianoroll"}, "model": {"name": "roll_rnn"}}
LEGACY = {"model": {"name": "roll_rnn", "head": "legacy"}}


@pytest.mark.parametrize(
    ("raw", "path", "text"),
    [
        ({"task": "separation", "model": "wav_unet"}, "model", "gives 1 source, the task wants 4"),
        ({**ROLL, "data": {"augment": ["gain"]}}, "data.augment", "is for audio"),
        ({**ROLL, "loss": {"mse": 1}}, "loss.mse", "set task.estimate=level"),
        (
            {**ROLL, "task": {"name": "pianoroll", "estimate": "level"}},
            "task.estimate",
            "trains logits",
        ),
        ({**ROLL, **LEGACY}, "loss.bce_logits", r"lies in \(-1, 1\).*below 0.3133"),
        ({**ROLL, "loss": {"bce_logits": 1, "kl": 0.1}}, "loss.kl", "needs mean and log_variance"),
        ({"task": "unshift", "model": "wav_unet", "loss": {"dice": 1}}, "loss.dice", "rolls"),
        ({"task": "separation", "model": "wavenet", "loss": {"umx_mse": 1}}, "loss.umx_mse", "mag"),
        (
            {
                "task": "unshift",
                "model": "wav_unet",
                "schedule": {"name": "plateau", "metric": "val_f1"},
            },
            "schedule.metric",
            "not scored by this task",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused_with_the_way_out(raw, path, text):
    with pytest.raises(ConfigError) as caught:
        resolve(raw, "test")
    said = dict(caught.value.problems)
    assert path in said
    assert re.search(text, said[path])


def test_the_logs_bce_on_a_bounded_head_can_still_be_asked_for():
    resolve({**ROLL, **LEGACY, "loss": {"bce_logits": {"bounded_ok": True}}}, "test")


def test_a_task_brings_its_own_defaults_of_the_data_and_the_yaml_wins():
    assert resolve(ROLL, "test").data.channels == 88
    found = resolve({"task": "separation", "model": "wavenet"}, "test").data
    assert found.sample_rate == 44100
    short = {"task": "separation", "model": "wavenet", "data": {"sample_rate": 8000}}
    assert resolve(short, "test").data.sample_rate == 8000


AUDIO = {"task": {"name": "unshift"}, "model": {"name": "wav_unet"}}
SOME = {"task": {"name": "separation", "instruments": ["drums", "bass", "other"]}}
SOME["task"]["targets"] = ["drums", "bass"]
VAE = {"task": "pianoroll", "model": {"name": "roll_autoencoder", "variational": True}}


@pytest.mark.parametrize(
    ("raw", "path", "text"),
    [
        (
            {**SOME, "model": {"name": "conv_separator", "head": "complementary"}},
            "model.head",
            "up",
        ),
        (
            {**AUDIO, "validation": {"segment": 2048}},
            "validation.segment",
            "2048 samples cannot be",
        ),
        ({**AUDIO, "data": {"sample_rate": 96000}, "loss": {"l1": 1}}, "data.sample_rate", "96000"),
        ({**AUDIO, "data": {"sample_rate": 96000}, "loss": {"mrstft": 1}}, "loss.mrstft", "n_bins"),
        ({**AUDIO, "loss": {"sum_constraint": 1}}, "loss.sum_constraint", "two sources or more"),
        (VAE, "loss", "needs kl beside it"),
    ],
)
def test_what_would_fail_only_in_training_is_refused_before_it(raw, path, text):
    with pytest.raises(ConfigError) as caught:
        resolve(raw, "test")
    assert text in dict(caught.value.problems)[path]


def test_another_rate_of_a_preset_keeps_the_ratio_of_its_two_rates(tiny):
    found = resolve({**tiny, "optim": {"preset": "muon_best", "lr": 1e-2}}, "test").optim
    assert found.options["adamw_lr"] == pytest.approx(1e-3)  # output28 of log 001
