import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bgray.records import read_info, read_lines
from bgray.train import main


@pytest.fixture
def yaml_file(tiny, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return str(path)


def only_run(results):
    (info,) = Path(results).glob("tiny/*/run.json")
    return str(info.parent)


def test_describe_prints_one_json_object_and_writes_nothing(yaml_file, tmp_path, capsys):
    main([yaml_file, "--describe"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["input_shape"] == [4, 1, 512]
    assert seen["bytes_per_batch"] == 4 * 512 * 2 * 2  # input and target, int16
    assert len(seen["id"]) == 12
    assert not (tmp_path / "results").exists()


def test_local_training_ends_with_its_numbers_against_doing_nothing(yaml_file, tmp_path, capsys):
    main([yaml_file, "--local", "--set", "train.steps=8"])
    run = only_run(tmp_path / "results")
    assert read_info(run)["state"] == "finished"
    out = capsys.readouterr().out
    assert "at step 8 (unprocessed input:" in out
    assert run in out


def test_running_it_again_does_not_train_again(yaml_file, tmp_path, capsys):
    main([yaml_file, "--local", "--set", "train.steps=8"])
    run = only_run(tmp_path / "results")
    before = read_lines(run + "/metrics.jsonl")
    main([yaml_file, "--local", "--set", "train.steps=8"])
    assert before == read_lines(run + "/metrics.jsonl")
    assert len(read_info(run)["attempts"]) == 1
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.yaml"], "nowhere.yaml:\n  no such file"),
        (["--set", "train.stesp=3"], "train.stesp: unknown key, did you mean 'steps'?"),
        (["--set", "optim.lr=1e-4"], "write 1.0e-4: YAML reads 1e-4 as text"),
        (["--set", "data.path=/nowhere"], "/nowhere"),
        (["--set", "data.sample_rate=16000"], "the shards have 8000 Hz"),
        (["--set", "task.semitones=5"], "no column 'shift_5'"),
    ],
)
def test_a_mistake_ends_in_one_message_and_no_folder(yaml_file, tmp_path, capsys, arguments, text):
    source = [] if arguments[0].endswith(".yaml") else [yaml_file]
    with pytest.raises(SystemExit, match="2"):
        main([*source, *arguments, "--local"])
    assert text in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(yaml_file, tmp_path, tiny):
    command = [sys.executable, "-m", "bgray.train", yaml_file, "--local"]
    command += ["--set", "train.steps=3000", "--set", "validation.every=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timing = tmp_path / "results" / "tiny"
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size > 500 for p in timing.glob("*/timing.jsonl")):
        assert time.monotonic() < deadline, "training did not start"
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in out
    info = read_info(only_run(tmp_path / "results"))
    assert info["state"] == "interrupted"
    assert 0 < info["step"] < 3000


def test_a_loss_that_is_not_finite_ends_in_one_line_and_exit_code_1(yaml_file, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main([yaml_file, "--local", "--set", "optim={name: adamw, lr: 1.0e+30}"])
    assert "diverged: loss_l1 not finite at step" in capsys.readouterr().out


def test_shards_that_do_not_fit_are_found_by_describe_already(yaml_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([yaml_file, "--describe", "--set", "data.sample_rate=16000"])
    assert "the shards have 8000 Hz" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_ddp_on_ray_train_follows_the_single_worker(yaml_file, tmp_path):
    # AdamW: Muon's bf16 Newton-Schulz would turn the last bits of a sum into percents.
    base = [yaml_file, "--set", "optim={name: adamw, lr: 1.0e-3}"]
    main([*base, "--local"])
    alone = read_lines(only_run(tmp_path / "results") + "/metrics.jsonl")
    command = [sys.executable, "-m", "bgray.train", *base, "--set", "runtime.workers=2"]
    command += ["--set", f"runtime.results={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    together = read_lines(only_run(tmp_path / "two") + "/metrics.jsonl")
    assert [line["step"] for line in alone] == [line["step"] for line in together]
    for a, b in zip(alone, together, strict=True):
        if "loss" in a:
            # Two halves of a mean add up in another order: float32 rounding, over 24 steps.
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        else:
            assert b["val"]["val_stft"] == pytest.approx(a["val"]["val_stft"], rel=1e-3)
