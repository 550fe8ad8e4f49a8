import importlib
import inspect
import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import TINY

from bgray import trackers
from bgray.problems import ConfigError
from bgray.sweep_config import split_sweep

VARIES = {"variant": "two kernels", "seed": 0, "model.kernels": [7, 11], "optim.lr": 1e-3}
NAME = "two_kernels-seed0-0123456789ab"


def sweep_with(wanted):
    return split_sweep({"name": "x", "trackers": wanted}, "x.yaml")


def refused(wanted):
    with pytest.raises(ConfigError) as caught:
        sweep_with(wanted)
    return str(caught.value)


def tune_trial(number=1):
    """What Tune hands its loggers, as far as they use it."""
    config = {"trial": "0123456789ab", "variant": "v", "seed": 0, "share": None}
    return SimpleNamespace(
        trial_id=f"tune{number}", config=config, evaluated_params=config, local_path="/nowhere",
        experiment_dir_name="tune",
    )  # fmt: skip


def results(*steps):
    """What Tune reports at these steps, with what it adds of its own."""
    for number, step in enumerate(steps, 1):
        scores = {"step": step, "val_stft": 10 / step, "val_si_sdr": float(step)}
        yield {**scores, "training_iteration": number, "done": False, "time_total_s": 1.5,
               "pid": 1, "config": {}, "timestamp": 0, "replayed": step < 8}  # fmt: skip


def tell(callback, *steps, failed=False, trial=None):
    trial = trial or tune_trial()
    callback.log_trial_start(trial)
    for number, result in enumerate(results(*steps), 1):
        callback.log_trial_result(number, trial, result)
    callback.log_trial_end(trial, failed)


@pytest.mark.parametrize(
    "wanted",
    [[], ["mlflow", "aim"], {"mlflow": {"tracking_uri": "file:///x"}, "wandb": None}],
)
def test_trackers_are_a_list_or_a_block_with_options(wanted):
    assert set(trackers.named(sweep_with(wanted).trackers)) == set(wanted)


def test_unknown_trackers_and_options_are_met_with_the_nearest_known_one():
    assert "trackers.mlfow: unknown tracker, did you mean 'mlflow'?" in refused(["mlfow"])
    text = refused({"mlflow": {"traking_uri": "x"}, "aim": {"repos": "y"}})
    assert "trackers.mlflow.traking_uri: unknown option, did you mean 'tracking_uri'?" in text
    assert "trackers.aim.repos: unknown option, did you mean 'repo'?" in text


@pytest.mark.parametrize(
    ("wanted", "variable"),
    [
        ({"wandb": {"api_key": "0123"}}, "WANDB_API_KEY"),
        ({"wandb": {"api_key_file": "key.txt"}}, "WANDB_API_KEY"),
        ({"mlflow": {"tracking_token": "0123"}}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": {"tracking_uri": "https://me:0123@host/"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": {"tracking_uri": "https://host/?token=0123"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": {"registry_uri": "https://host/a?x=1&X-Auth=0123"}}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": {"tags": {"password": "0123"}}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": {"tags": {"a": [{"b": {"Api-Key": "0123"}}]}}}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": {"tags": {"made by": "https://me:0123@host/"}}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"wandb": {"tags": {"api_key": "0123"}}}, "WANDB_API_KEY"),
        ({"wandb": {"tags": ["quick", "https://host/?api_key=0123"]}}, "WANDB_API_KEY"),
    ],
)
def test_secrets_are_refused_with_the_variable_to_set_and_are_not_repeated(wanted, variable):
    text = refused(wanted)
    assert variable in text
    assert "0123" not in text


def test_a_secret_is_named_by_its_path_however_deep():
    text = refused({"mlflow": {"tags": {"a": [1, {"token": "0123"}]}}})
    assert "trackers.mlflow.tags.a[1].token: a secret has no place" in text


def test_what_only_sounds_like_a_secret_is_none():
    tags = {"instrument": "keyboard", "keyboards": 2, "tokenizer": "dac", "see": "http://h/?a=key"}
    wanted = {"mlflow": {"tags": tags, "tracking_uri": "https://tokens.example/key/secret?page=2"}}
    assert sweep_with(wanted).trackers == wanted


@pytest.mark.parametrize(
    ("name", "option", "value", "text"),
    [
        ("mlflow", "tracking_uri", 5, "expected text, got 5"),
        ("mlflow", "experiment_name", True, "expected text, got True"),
        ("mlflow", "save_artifact", "yes", "expected true or false, got 'yes'"),
        ("mlflow", "save_artifact", 1, "expected true or false, got 1"),
        ("mlflow", "tags", ["a"], "expected a block of names and values, got a list"),
        ("wandb", "tags", {"a": 1}, "expected a list, got a block"),
        ("aim", "system_tracking_interval", True, "expected a number, got True"),
    ],
)
def test_an_option_of_the_wrong_type_is_an_error_with_its_path(name, option, value, text):
    assert f"trackers.{name}.{option}: {text}" in refused({name: {option: value}})


def test_options_of_the_right_type_are_taken():
    wanted = {
        "mlflow": {"tracking_uri": "http://h", "save_artifact": False, "tags": {"a": 1}},
        "wandb": {"tags": ["a"], "notes": None, "mode": "offline"},
        "aim": {"system_tracking_interval": 1.5, "log_system_params": True},
    }
    assert sweep_with(wanted).trackers == wanted


def test_a_package_that_is_missing_is_named_before_anything_starts(tiny, tmp_path, capsys):
    from bgray.sweep import main

    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**tiny, "trackers": ["aim"]}))
    with pytest.raises(SystemExit) as caught:
        main([str(path)])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert re.search(r"trackers.aim: is not installed: uv pip install aim \(or pip", text)
    assert not (tmp_path / "results").exists()


def test_what_may_be_set_is_what_tunes_callbacks_take():
    for tracker in trackers.TRACKERS.values():
        module, _, name = tracker.callback.rpartition(".")
        taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        assert anything or set(tracker.options) <= set(taken)
        assert not [option for option in tracker.options if trackers.SECRET.search(option)]


@pytest.fixture
def recorder(monkeypatch):
    """A tracker that keeps what it is told, through a callback as Tune's are."""
    import sys

    from ray.tune.logger import LoggerCallback

    told = []

    class Recorder(LoggerCallback):
        away = False

        def __init__(self, experiment_name):
            told.append(("experiment", experiment_name))

        def setup(self, *args, **info):
            if Recorder.away:
                raise ConnectionError("nobody\nthere")

        def log_trial_start(self, trial):
            told.append(("start", str(trial), trial.config, trial.evaluated_params))

        def log_trial_result(self, iteration, trial, result):
            if Recorder.away:
                raise ConnectionError("nobody there")
            told.append(("result", str(trial), result))

        def log_trial_end(self, trial, failed=False):
            told.append(("end", str(trial), failed))

    module = SimpleNamespace(Recorder=Recorder)
    monkeypatch.setitem(sys.modules, "recorder_of_tests", module)
    entry = trackers.Tracker("recorder_of_tests", "recorder_of_tests.Recorder", {}, "")
    monkeypatch.setitem(trackers.TRACKERS, "recorder", entry)
    return told, Recorder


def made(say=print, wanted=("recorder",)):
    scores = ("val_stft", "val_si_sdr")
    return trackers.callbacks(wanted, "tiny", lambda id: (NAME, VARIES), scores, say)


def test_a_tracker_is_told_what_varies_and_our_scores_at_our_steps(recorder):
    told, _ = recorder
    (callback,) = made()
    tell(callback, 8, 16)
    assert told == [
        ("experiment", "tiny"),
        ("start", NAME, VARIES, VARIES),
        ("result", NAME, {"val_stft": 1.25, "val_si_sdr": 8.0, "training_iteration": 8}),
        ("result", NAME, {"val_stft": 0.625, "val_si_sdr": 16.0, "training_iteration": 16}),
        ("end", NAME, False),
    ]


def test_a_step_that_comes_again_after_a_restart_is_told_once(recorder):
    told, _ = recorder
    (callback,) = made()
    tell(callback, 8, 16, 8, 16, 24)
    assert [entry[2]["training_iteration"] for entry in told if entry[0] == "result"] == [8, 16, 24]


def test_a_tracker_that_goes_away_is_named_once_and_ends_nothing(recorder):
    _, kind = recorder
    said = []
    (callback,) = made(said.append)
    kind.away = True
    tell(callback, 8, 16, 24)
    assert said == ["recorder does not get everything (ConnectionError: nobody there)"]


def test_a_tracker_that_cannot_start_is_refused_in_words(recorder):
    _, kind = recorder
    kind.away = True
    with pytest.raises(ConfigError, match="recorder: does not start: nobody there"):
        made()


@pytest.mark.filterwarnings("ignore")  # of its own database's
def test_mlflow_itself_has_the_values_and_the_steps(tmp_path, monkeypatch):
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    (callback,) = made(pytest.fail, {"mlflow": {"tracking_uri": uri}})
    tell(callback, 8, 16, failed=False)
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == NAME
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "variant": "two kernels", "seed": "0", "model.kernels": "[7, 11]", "optim.lr": "0.001"
    }  # fmt: skip
    history = client.get_metric_history(run.info.run_id, "val_stft")
    assert [(point.step, point.value) for point in history] == [(8, 1.25), (16, 0.625)]


def test_the_trackers_of_a_sweep_do_not_change_what_its_runs_are():
    assert "trackers" not in split_sweep({**TINY, "trackers": ["aim"]}, "x.yaml").base
