"""What is written is read with TensorBoard's own reader."""

import dataclasses
import io
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from bgray import records, storage, tensorboard
from bgray.agenda import Agenda
from bgray.config import Experiment
from bgray.context import Context
from bgray.event_files import SHORT, checksum
from bgray.experiment import prepare_data
from bgray.records import read_info, read_lines
from bgray.search import expand
from bgray.tensorboard import Events, dirname, folder_of, spectrogram
from bgray.trial import run_trial

STEPS = [8, 16, 24]


@pytest.fixture(scope="module")
def done(shards_url, tmp_path_factory):
    """(sweep's YAML, results) of two variants that have run to their end."""
    from conftest import TINY

    root = tmp_path_factory.mktemp("done")
    raw = {**TINY, "name": "tiny", "optim": {"name": "adamw", "lr": 1e-3}}
    raw["data"] = {**raw["data"], "path": shards_url}
    raw["variants"] = {"base": {}, "two kernels": {"model.kernels": [7, 11]}}
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    _, trials = expand(str(path), (f"runtime.results={root / 'results'}",))
    for trial in trials:
        run_trial(trial.experiment, prepare_data(trial.experiment), Context())
    return path, root / "results"


@pytest.fixture
def agenda(done, tmp_path):
    """Of a copy of it."""
    path, results = done
    shutil.copytree(results, tmp_path / "results")
    return Agenda(*expand(str(path), (f"runtime.results={tmp_path / 'results'}",)))


def write(agenda, *steps, end=False, replayed=(), say=print):
    """A session: every trial starts, is evaluated at `replayed` and `steps`, and perhaps ends."""
    events = Events(agenda, say)
    for run_id in agenda.trials:
        events.start(run_id)
        for step in (*replayed, *steps):
            events.report(run_id, step, replayed=step in replayed)
        if end:
            events.end(run_id)
    events.close()


def multiplexer(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

        every = {"scalars": 0, "tensors": 0}
        found = EventMultiplexer(size_guidance=every, tensor_size_guidance={
            "scalars": 10**6, "audio": 10**6, "images": 10**6, "text": 10**6
        }).AddRunsFromDirectory(place)  # fmt: skip
        return found.Reload()


def shown(agenda, variant=0):
    """TensorBoard's reader of one trial's run."""
    trial = list(agenda.trials.values())[variant]
    return multiplexer(folder_of(agenda.folder)).GetAccumulator(dirname(trial))


def steps(reader, tag):
    return [event.step for event in reader.Tensors(tag)]


def session(reader, kind):
    """What the table of hyper-parameters knows of a run; None where it has no such record."""
    from tensorboard.plugins.hparams import metadata

    content = reader.PluginTagToContent("hparams").get(f"_hparams_/{kind}")
    parse = getattr(metadata, f"parse_{kind}_plugin_data")
    return None if content is None else parse(content)


def shown_as_they_are(folder):
    """Every trial is one run in TensorBoard, with the evaluations that its own folder has."""
    found = multiplexer(f"{folder}/.ray/tune")
    assert len(found.Runs()) == 1 + len(records.runs(folder))
    for run in records.runs(folder):
        (name,) = [name for name in found.Runs() if name.endswith(f"-{run.id}")]
        reader = found.GetAccumulator(name)
        tags = reader.Tags()["tensors"]
        expected = [step for step, _ in records.evaluations(run.url)]
        got = [e.step for e in reader.Tensors("val/val_stft")] if "val/val_stft" in tags else []
        assert got == expected
        assert not [tag for tag in tags if tag.startswith("ray/")]
        assert "seed" in session(reader, "session_start_info").hparams
        assert session(reader, "session_end_info") is not None


def test_every_number_is_at_its_own_step_under_one_tag(agenda):
    write(agenda, *STEPS, end=True)
    reader = shown(agenda)
    url = next(iter(agenda.trials.values())).url
    lines = read_lines(f"{url}/metrics.jsonl")
    scores = {line["step"]: line["val"] for line in lines if "val" in line}
    train = {line["step"]: line for line in lines if "val" not in line}
    for name in ("val_stft", "val_si_sdr"):
        found = {e.step: e.tensor_proto.float_val[0] for e in reader.Tensors(f"val/{name}")}
        assert found == pytest.approx({step: values[name] for step, values in scores.items()})
    for tag, name in {
        "loss/total": "loss",
        "loss/l1": "loss_l1",
        "train/grad_norm": "grad_norm",
    }.items():
        found = [(e.step, e.tensor_proto.float_val[0]) for e in reader.Tensors(tag)]
        expected = [(step, pytest.approx(line[name])) for step, line in train.items()]
        assert found == expected
    assert {tag.split("/")[0] for tag in reader.PluginTagToContent("scalars")} == {
        "val", "loss", "train", "time", "memory"
    }  # fmt: skip
    assert not [tag for tag in reader.Tags()["tensors"] if "iteration" in tag or "done" in tag]


def test_moments_of_lines_that_are_written_together_are_as_far_apart_as_the_training_took(agenda):
    write(agenda, *STEPS)
    url = next(iter(agenda.trials.values())).url
    seconds = {line["step"]: line["train_seconds"] for line in read_lines(f"{url}/timing.jsonl")}
    walls = {event.step: event.wall_time for event in shown(agenda).Tensors("loss/total")}
    assert walls[22] - walls[18] == pytest.approx(seconds[22] - seconds[18], abs=1e-3)


def test_what_varies_is_in_the_table_before_the_first_score(agenda):
    write(agenda)
    found = [dict(session(shown(agenda, i), "session_start_info").hparams) for i in (0, 1)]
    assert [set(values) for values in found] == [{"variant", "seed", "model.kernels"}] * 2
    assert [values["model.kernels"].string_value for values in found] == ["[7]", "[7, 11]"]
    assert [values["variant"].string_value for values in found] == ["base", "two kernels"]
    assert found[0]["seed"].number_value == 0
    assert session(shown(agenda), "session_end_info") is None
    table = session(multiplexer(folder_of(agenda.folder)).GetAccumulator("."), "experiment")
    assert [info.name.tag for info in table.metric_infos][:2] == ["val/val_stft", "val/val_si_sdr"]
    assert {info.name for info in table.hparam_infos} == {"variant", "seed", "model.kernels"}


def test_clips_are_heard_sample_by_sample_input_and_target_once(agenda):
    from tensorboard.plugins.audio import metadata

    write(agenda, *STEPS)
    reader, trial = shown(agenda), next(iter(agenda.trials.values()))
    assert steps(reader, "clip 000/output") == STEPS
    assert steps(reader, "clip 000/input") == steps(reader, "clip 000/target") == [0]
    for event in reader.Tensors("clip 000/output"):
        heard, rate = soundfile.read(io.BytesIO(event.tensor_proto.string_val[0]), dtype="int16")
        clip = f"{trial.url}/clips/000-step-{event.step:06d}.wav"
        expected, expected_rate = soundfile.read(clip, dtype="int16")
        assert rate == expected_rate
        assert np.array_equal(heard, expected)
    content = reader.PluginTagToContent("audio")["clip 000/output"]
    assert metadata.parse_plugin_metadata(content).encoding == metadata.Encoding.Value("WAV")
    assert steps(reader, "spectrogram 000/output") == STEPS
    width, height, png = reader.Tensors("spectrogram 000/input")[0].tensor_proto.string_val
    assert Image.open(io.BytesIO(png)).size == (int(width), int(height))


def test_stems_have_tags_of_their_own_and_rolls_show_their_picture(agenda):
    trial = next(iter(agenda.trials.values()))
    clips = Path(trial.url, "clips")
    for path in list(clips.glob("000-step-000008.wav")):
        path.rename(clips / "000-step-000008-vocals.wav")
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(clips / "000-step-000008-vocals.png")
    write(agenda, 8)
    reader = shown(agenda)
    assert steps(reader, "clip 000/output-vocals") == [8]
    width, height, _ = reader.Tensors("spectrogram 000/output-vocals")[0].tensor_proto.string_val
    assert (int(width), int(height)) == (5, 3)


def test_checksums_of_long_records_are_those_of_the_plain_way():
    from tensorboardX.crc32c import crc32c

    assert checksum(b"123456789") == 0xE3069283  # the catalogues' check value of CRC-32C
    rng = np.random.default_rng(0)
    for size in (SHORT, SHORT + 1, 2 * SHORT, 50_003):
        data = rng.bytes(size)
        assert checksum(data) == crc32c(data)
        assert checksum(data) != checksum(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_spectrogram_is_brightest_where_the_tone_is_and_spans_100_db():
    rate, time_ = 16_000, np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 2000 * time_)  # a quarter of what is drawn
    drawn = np.asarray(Image.open(io.BytesIO(spectrogram(tone[None], rate))))  # palette's indices
    height = drawn.shape[0]
    assert height - 1 - drawn[:, 10].argmax() == (height - 1) // 4
    assert drawn[:, 10].max() >= 254
    quiet = np.asarray(Image.open(io.BytesIO(spectrogram(0.01 * tone[None], rate))))
    assert int(drawn.max()) - int(quiet.max()) == pytest.approx(0.4 * 255, abs=2)
    assert np.asarray(Image.open(io.BytesIO(spectrogram(np.zeros((2, 9)), rate)))).max() == 0


def test_a_click_stays_visible_however_long_the_clip():
    sound = np.zeros((1, 600_000))
    sound[0, 300_000] = 1.0
    drawn = np.asarray(Image.open(io.BytesIO(spectrogram(sound, 16_000))))
    assert drawn.shape[1] <= tensorboard.WIDTH
    assert abs(drawn.max(axis=0).argmax() - drawn.shape[1] / 2) < 3


def test_what_an_earlier_session_wrote_stays_and_no_step_is_there_twice(agenda):
    write(agenda, 8, 16)
    folder = Path(folder_of(agenda.folder), dirname(next(iter(agenda.trials.values()))))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.1-*")}
    write(agenda, 24, replayed=(8, 16), end=True)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.1-*")}
    assert before.items() <= after.items()
    assert len(after) == 3
    reader = shown(agenda)
    assert steps(reader, "val/val_stft") == steps(reader, "clip 000/output") == STEPS
    assert steps(reader, "loss/total") == list(range(2, 25, 2))
    runs = multiplexer(folder_of(agenda.folder)).Runs()
    assert set(runs) == {".", *(dirname(trial) for trial in agenda.trials.values())}


def test_a_trial_with_a_new_label_stays_the_run_that_it_was(agenda):
    write(agenda, 8)
    id, trial = next(iter(agenda.trials.items()))
    agenda.trials[id] = dataclasses.replace(trial, label="renamed")
    write(agenda, 16, replayed=(8,))
    found = multiplexer(folder_of(agenda.folder))
    assert len(found.Runs()) == 3
    assert steps(found.GetAccumulator(dirname(trial)), "val/val_stft") == [8, 16]


def test_an_evaluation_made_again_replaces_the_first(agenda):
    write(agenda, *STEPS)
    url = next(iter(agenda.trials.values())).url
    text = Path(url, "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    changed = [
        {**x, "val": {"val_stft": 1.5}} if "val" in x and x["step"] == 16 else x for x in lines
    ]
    Path(url, "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in changed))
    write(agenda, 16, replayed=(8,))
    found = {e.step: e.tensor_proto.float_val[0] for e in shown(agenda).Tensors("val/val_stft")}
    assert found[16] == 1.5
    assert list(found) == STEPS


def test_what_the_run_no_longer_knows_is_shown_no_longer(agenda):
    write(agenda, *STEPS, end=True)
    url = next(iter(agenda.trials.values())).url
    lines = Path(url, "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 8]
    Path(url, "metrics.jsonl").write_text("\n".join(kept) + "\n")
    write(agenda)
    reader = shown(agenda)
    assert steps(reader, "val/val_stft") == [8]
    assert session(reader, "session_end_info") is None


@pytest.mark.parametrize(
    ("state", "word"), [("finished", "SUCCESS"), ("stopped", "SUCCESS"), ("diverged", "FAILURE")]
)
def test_the_end_says_how_and_why(agenda, state, word):
    from tensorboard.plugins.hparams import api_pb2

    url = next(iter(agenda.trials.values())).url
    info = {**(read_info(url) or {}), "state": state, "reason": "of the moon"}
    Path(url, "run.json").write_text(json.dumps(info))
    write(agenda, 8, end=True)
    reader = shown(agenda)
    assert session(reader, "session_end_info").status == api_pb2.Status.Value(f"STATUS_{word}")
    (event,) = reader.Tensors("state")
    assert event.tensor_proto.string_val[0].decode() == f"{state} at step 24: of the moon"
    assert steps(reader, "loss/total") == list(range(2, 25, 2)), "what came after the evaluation"


def test_an_interrupted_trial_has_not_ended(agenda):
    url = next(iter(agenda.trials.values())).url
    info = {**(read_info(url) or {}), "state": "interrupted"}
    Path(url, "run.json").write_text(json.dumps(info))
    write(agenda, *STEPS, end=True)
    assert session(shown(agenda), "session_end_info") is None


def files_of(agenda, variant=0):
    """Names of a trial's files, without their times; with what they hold."""
    folder = Path(folder_of(agenda.folder), dirname(list(agenda.trials.values())[variant]))
    return {path.name.rpartition(".")[2]: path.read_bytes() for path in folder.iterdir()}


def catch_up(agenda, say=pytest.fail):
    events = Events(agenda, say)
    events.catch_up()
    events.close()


@pytest.mark.parametrize("lost", ["*.2-end", "*.1-00000016", "*"])
def test_a_later_session_writes_what_is_missing_of_trials_that_have_ended(agenda, lost):
    write(agenda, *STEPS, end=True)
    before = [set(files_of(agenda, i)) for i in (0, 1)]
    untouched = files_of(agenda, 1)
    first, _ = agenda.trials.values()
    for path in Path(folder_of(agenda.folder), dirname(first)).glob(lost):
        path.unlink()
    assert Events(agenda).missing() == [first.id]
    catch_up(agenda)
    assert [set(files_of(agenda, i)) for i in (0, 1)] == before
    assert files_of(agenda, 1) == untouched
    assert not Events(agenda).missing()
    reader = shown(agenda)
    assert steps(reader, "val/val_stft") == steps(reader, "clip 000/output") == STEPS
    assert steps(reader, "loss/total") == list(range(2, 25, 2))
    assert session(reader, "session_end_info") is not None


def test_a_sweep_that_nothing_was_written_of_is_caught_up_on_with_its_own_times(agenda):
    url = next(iter(agenda.trials.values())).url
    ran = time.time() - 86400
    os.utime(f"{url}/metrics.jsonl", (ran, ran))
    assert set(Events(agenda).missing()) == set(agenda.trials)
    catch_up(agenda)
    assert not Events(agenda).missing()
    walls = [event.wall_time for event in shown(agenda).Tensors("val/val_stft")]
    assert walls[-1] == pytest.approx(ran, abs=1)
    assert walls == sorted(walls)


def test_an_interrupted_trial_is_caught_up_on_without_an_end(agenda):
    path = Path(next(iter(agenda.trials.values())).url, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted"}))
    other = Agenda(agenda.sweep, list(agenda.trials.values()))
    catch_up(other)
    assert set(files_of(other)) == {"0-start", "1-00000008", "1-00000016", "1-00000024"}
    assert "2-end" in files_of(other, 1)
    assert not Events(other).missing()


def test_a_trial_that_starts_again_is_left_to_itself(agenda):
    events, run_id = Events(agenda, pytest.fail), next(iter(agenda.trials))
    events.start(run_id)
    events.catch_up()
    events.report(run_id, 8, replayed=True)
    events.close()
    assert set(files_of(agenda)) == {"0-start", "1-00000008"}
    assert "2-end" in files_of(agenda, 1)


def test_a_rerun_with_nothing_left_to_do_writes_what_is_missing(done, tmp_path, capsys):
    from bgray.sweep import main

    path, results = done
    shutil.copytree(results, tmp_path / "results")
    command = [str(path), "--set", f"runtime.results={tmp_path / 'results'}"]
    for _ in range(2):  # the first one writes sweep.json as well
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 0
        folder = tmp_path / "results" / "tiny" / ".ray" / "tune"
        assert len(list(folder.glob("*/*.2-end"))) == 2
        assert len(list(folder.glob("*/*.1-*"))) == 6
        for name in folder.glob("*/*.2-end"):
            name.unlink()
        assert not (tmp_path / "results" / "tiny" / "lease.json").exists()
    assert "not complete" not in capsys.readouterr().out


def test_starting_many_trials_resolves_each_variant_once(tiny, tmp_path, monkeypatch):
    number = 8
    raw = {**tiny, "optim": {"name": "adamw", "lr": 1e-3}, "samples": number}
    raw |= {"search": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, "sampler": "random", "seeds": 2}
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(raw))
    agenda = Agenda(*expand(str(path)))
    asked, resolved = [], Experiment.resolved

    def counted(self):
        asked.append(self)
        return resolved(self)

    monkeypatch.setattr(Experiment, "resolved", counted)
    events = Events(agenda, pytest.fail)
    for trial in agenda.trials.values():
        events.start(trial.id)
        assert events.values(trial)["optim.lr"]  # as a tracker asks, in another thread
    events.close()
    assert len(list(Path(folder_of(agenda.folder)).glob("*/*.0-start"))) == 2 * number
    assert len(asked) <= number


def test_an_evaluation_reads_only_what_is_new(agenda):
    events, (trial, _) = Events(agenda, pytest.fail), agenda.trials.values()
    folder = Path(folder_of(agenda.folder), dirname(trial))
    metrics = Path(trial.url, "metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    parts = {step: [x for x in lines if step - 8 < json.loads(x)["step"] <= step] for step in STEPS}
    metrics.write_text("")
    events.start(trial.id)
    for step in STEPS:
        # What was read before is damaged, but not in its length.
        old = metrics.read_text()
        with metrics.open("r+") as file:
            file.write("?" * max(0, len(old) - 300))
            file.seek(0, 2)
            file.write("".join(parts[step]))
        events.report(trial.id, step)
        deadline = time.monotonic() + 20
        while not list(folder.glob(f"*.1-{step:08d}")) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "?" in metrics.read_text()
    events.close()
    assert steps(shown(agenda), "loss/total") == list(range(2, 25, 2))


def test_what_cannot_be_written_is_said_once_and_ends_nothing(agenda):
    Path(agenda.folder, ".ray").write_text("in the way")
    said = []
    write(agenda, *STEPS, end=True, say=said.append)
    assert len(said) == 1
    assert "TensorBoard's files are not complete" in said[0]


def test_the_driver_does_not_wait_for_slow_storage(agenda, monkeypatch):
    done = []

    def slow(url, data):
        time.sleep(0.5)
        done.append(url)

    monkeypatch.setattr(storage, "write_bytes", slow)
    said, run_id = [], next(iter(agenda.trials))
    events = Events(agenda, said.append)
    events.start(run_id)
    events.report(run_id, 8)
    assert not done
    events.close(0.1)
    assert said == [
        "TensorBoard's files are not complete (not all is written after 0 s); what is missing is "
        "written when the same command runs again"
    ]
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(done) == 3


def test_names_of_runs_are_short_and_safe_and_tell_trials_apart(agenda):
    one, two = agenda.trials.values()
    label = 'optim.lr=0.1 kernels=[7,23,"é/:*?"] ' + 50 * "x"
    name = dirname(dataclasses.replace(one, label=label))
    assert name.startswith("optim.lr=0.1_kernels=7,23,_")
    assert name.endswith(f"-seed0-{one.id}")
    assert len(name) <= 60 + len("-seed0-") + 12
    assert not set(name) & set(" /:*?\"'[]<>|\\")
    assert dirname(dataclasses.replace(two, label=label)) != name
    assert dirname(dataclasses.replace(one, label="***")).startswith("seed0-")


def test_what_a_search_will_draw_has_its_column_at_once(done):
    path, _ = done
    raw = yaml.safe_load(path.read_text())
    del raw["variants"]
    raw["search"] = {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "model.kernels": {"choice": [[7], [11]]},
    }
    raw |= {"sampler": "tpe", "samples": 2}
    other = path.with_name("tpe.yaml")
    other.write_text(yaml.safe_dump(raw))
    agenda = Agenda(*expand(str(other), (f"runtime.results={path.parent / 'tpe'}",)))
    values = Events(agenda).values(next(iter(agenda.trials.values())))
    assert values == {"variant": "base", "seed": 0, "optim.lr": 1e-3, "model.kernels": [7]}


def test_tune_adds_no_logger_of_its_own_beside_ours(agenda):
    from ray.tune.logger import TBXLoggerCallback
    from ray.tune.utils.callback import _create_default_callbacks

    ours = tensorboard.callback(Events(agenda))
    found = [c for c in _create_default_callbacks([ours]) if isinstance(c, TBXLoggerCallback)]
    assert found == [ours]


def test_a_bucket_has_it_too_and_tensorboard_reads_it_there(done, s3, monkeypatch):
    path, results = done
    agenda = Agenda(*expand(str(path), (f"runtime.results={s3}/results",)))
    for local in (results / "tiny").rglob("*"):
        if local.is_file() and ".ray" not in local.parts:
            rest = local.relative_to(results).as_posix()
            storage.write_bytes(f"{s3}/results/{rest}", local.read_bytes())
    agenda = Agenda(agenda.sweep, list(agenda.trials.values()))  # of what is there now
    assert len(Events(agenda).missing()) == 2
    write(agenda, *STEPS, end=True)
    place = storage.join(folder_of(agenda.folder), dirname(next(iter(agenda.trials.values()))))
    (end,) = [name for name in storage.listdir(place) if name.endswith(".2-end")]
    assert not Events(agenda).missing()
    storage.remove(storage.join(place, end))
    assert len(Events(agenda).missing()) == 1
    catch_up(agenda)
    assert not Events(agenda).missing()
    monkeypatch.setenv("S3_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    reader = shown(agenda)
    assert steps(reader, "val/val_stft") == steps(reader, "clip 000/output") == STEPS
