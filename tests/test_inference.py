import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from bgray import checkpoint, inference
from bgray.apply import main as apply
from bgray.build import build_model
from bgray.config import ConfigError
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.inference import fades, load, process
from bgray.midi import write_midi
from bgray.trial import run_trial


class Halves(nn.Module):
    """Two sources, each half the input, of any length."""

    def forward(self, audio):
        return torch.stack([0.5 * audio, 0.5 * audio], dim=1)


class Smooths(nn.Module):
    """A moving average over 65 samples; lengths must be multiples of 4."""

    length_multiple = 4

    def forward(self, audio):
        assert audio.shape[-1] % 4 == 0
        kernel = torch.full((1, 1, 65), 1 / 65)
        return nn.functional.conv1d(audio, kernel, padding=32)[:, None]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 1750, 4321])
def test_chunks_put_together_are_the_whole_at_any_length(length):
    audio = noise(2, length)
    found = process(Halves(), audio, segment=1000, overlap=0.25)
    assert found.shape == (2, 2, length)
    torch.testing.assert_close(found, torch.stack([0.5 * audio] * 2), rtol=1e-6, atol=1e-6)


def test_a_net_that_sees_no_further_than_the_context_gives_what_the_whole_gives():
    audio = noise(1, 5000)
    whole = process(Smooths(), audio, segment=5000)
    # 200 samples are shared, the outer 50 on each side are context, and the net sees 32.
    chunked = process(Smooths(), audio, segment=800, overlap=0.25)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    hard_cut = process(Smooths(), audio, segment=800, overlap=0.0)
    assert (hard_cut - whole).abs().max() > 0.05


def test_the_weights_of_two_neighbours_add_up_to_one():
    left = fades(100, 40, first=True, last=False)
    right = fades(100, 40, first=False, last=True)
    torch.testing.assert_close(left[60:] + right[:40], torch.ones(40))
    assert left[0] == right[-1] == 1
    assert (right[:10] == 0).all()


@pytest.fixture
def run(tiny):
    """A trained run's folder and its experiment."""
    tiny["train"]["steps"], tiny["validation"]["every"] = 4, 4
    experiment = resolve(tiny, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    return run_url(experiment)


def test_a_run_is_loaded_with_the_weights_of_its_last_checkpoint(run):
    trained = load(run, torch.device("cpu"))
    assert trained.step == 4
    assert not trained.model.training
    saved = checkpoint.load(run)
    fresh = build_model(trained.experiment).state_dict()
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, saved["model"][key])
    assert any(not torch.equal(fresh[key], saved["model"][key]) for key in fresh)


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        load(str(tmp_path), torch.device("cpu"))
    (tmp_path / "experiment.yaml").write_bytes(open(f"{run}/experiment.yaml", "rb").read())
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        load(str(tmp_path), torch.device("cpu"))


def test_channels_that_a_net_cannot_take_together_pass_one_by_one(run):
    trained = load(run, torch.device("cpu"))
    audio = noise(3, 3000).numpy()
    found = trained(audio)
    assert found.shape == (1, 3, 3000)
    alone = trained(audio[1:2])
    np.testing.assert_allclose(found[:, 1:2], alone, atol=1e-6)
    stereo = dataclasses.replace(
        trained, experiment=dataclasses.replace(
            trained.experiment, data=dataclasses.replace(trained.experiment.data, channels=2)
        )
    )  # fmt: skip
    np.testing.assert_allclose(stereo(audio[:1]), trained(audio[:1]), atol=1e-6)


# --- python -m bgray.apply


@pytest.mark.parametrize(("rate", "channels", "length"), [(8000, 1, 5001), (11025, 2, 7777)])
def test_apply_keeps_rate_channels_and_length(run, tmp_path, rate, channels, length, capsys):
    sound = 0.1 * noise(length, channels).numpy()
    soundfile.write(tmp_path / "in.wav", sound, rate)
    apply([run, str(tmp_path / "in.wav"), "--device", "cpu"])
    audio, found = soundfile.read(tmp_path / "in-restored.wav", always_2d=True)
    assert (found, audio.shape) == (rate, (length, channels))
    assert "in-restored.wav" in capsys.readouterr().out


def test_apply_writes_what_the_model_gives(run, tmp_path):
    sound = 0.1 * noise(1, 3000).numpy()
    soundfile.write(tmp_path / "in.wav", sound.T, 8000, subtype="FLOAT")
    apply([run, str(tmp_path / "in.wav"), "--output", str(tmp_path / "out.wav")])
    audio, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    trained = load(run, torch.device("cpu"))
    np.testing.assert_allclose(audio, trained(sound.astype(np.float32))[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "no such file"), (b"not audio", "no audio that can be read")],
)
def test_apply_names_a_file_that_it_cannot_use(run, tmp_path, content, text, capsys):
    if content is not None:
        (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        apply([run, str(tmp_path / "x.wav")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert text in error
    assert "x.wav" in error


def test_apply_wants_an_input_or_a_number_to_generate_and_not_both(run, capsys):
    for arguments in ([run], [run, "x.wav", "--generate", "1"]):
        with pytest.raises(SystemExit):
            apply(arguments)
        assert "give a file, or --generate N, and not both" in capsys.readouterr().err


def test_only_piano_rolls_generate(run, capsys):
    with pytest.raises(SystemExit):
        apply([run, "--generate", "1"])
    assert "wav_unet does not generate" in capsys.readouterr().err


def test_resampling_to_the_same_rate_changes_nothing():
    audio = noise(1, 100).numpy()
    assert inference.resample(audio, 8000, 8000) is audio


# --- piano rolls


@pytest.fixture
def roll_run(tmp_path):
    raw = {
        "name": "rolls",
        "task": {"name": "pianoroll", "threshold": 0.3},
        "data": {"builtin_songs": 4},
        "model": {"name": "roll_rnn", "encoder": [4], "layers": 1},
        "train": {"steps": 2, "batch_size": 2},
        "validation": {"every": 2, "items": 1, "clips": 1},
        "runtime": {
            "results": str(tmp_path / "results"),
            "cache": str(tmp_path / "data"),
            "device": "cpu",
            "threads": 1,
        },
    }
    experiment = resolve(raw, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    return run_url(experiment)


def test_a_midi_file_longer_than_a_piece_is_reconstructed_as_the_model_gives_it(roll_run, tmp_path):
    roll = np.zeros((88, 2500), np.uint8)
    roll[40, ::7] = roll[43, :30] = roll[45, -1] = 1
    (tmp_path / "song.mid").write_bytes(write_midi(roll))
    apply([roll_run, str(tmp_path / "song.mid"), "--output", str(tmp_path / "out.mid")])
    trained = load(roll_run, torch.device("cpu"))
    padded = np.pad(roll, ((0, 0), (0, 1340))).astype(np.float32)
    pieces = [trained(padded[:, :1920])[0], trained(padded[:, 1920:])[0]]
    expected = trained.task.notes(np.concatenate(pieces, axis=1)[:, :2500])
    assert (tmp_path / "out.mid").read_bytes() == write_midi(expected)


def test_generation_depends_on_the_seed_alone(roll_run, tmp_path):
    for folder in ("a", "b"):
        out = ["--output", str(tmp_path / folder), "--seed", "5"]
        apply([roll_run, "--generate", "2", *out])
    found = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert found == ["0005.mid", "0006.mid"]
    for name in found:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_is_no_midi_is_refused(roll_run, tmp_path, capsys):
    (tmp_path / "song.mid").write_bytes(b"no midi")
    with pytest.raises(SystemExit):
        apply([roll_run, str(tmp_path / "song.mid")])
    assert "song.mid" in capsys.readouterr().err


# --- what apply refuses rather than harm


@pytest.mark.parametrize(
    ("output", "text"),
    [("in.wav", "is the input itself"), ("out.mp3", "is written as .wav; name it so")],
)
def test_apply_refuses_to_replace_its_input_or_to_lie_about_the_format(
    run, tmp_path, output, text, capsys
):
    soundfile.write(tmp_path / "in.wav", 0.1 * noise(1000).numpy(), 8000)
    before = (tmp_path / "in.wav").read_bytes()
    with pytest.raises(SystemExit) as ended:
        apply([run, str(tmp_path / "in.wav"), "--output", str(tmp_path / output)])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
    assert (tmp_path / "in.wav").read_bytes() == before


@pytest.mark.parametrize("overlap", [-0.2, 0.6, 1.0])
def test_an_overlap_out_of_range_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap: must be 0 to 0.5"):
        process(Halves(), noise(1, 100), 50, overlap)
