"""Apply: a trained run on an audio or MIDI file of any length, rate and channel count.

python -m bgray.apply RUN INPUT [--output PLACE] [--overlap 0.25] [--checkpoint latest|best]
python -m bgray.apply RUN --generate 4 --output FOLDER

Audio is written as WAV (float32, at the input's rate and length), rolls as MIDI.
"""

import argparse
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bgray import storage
from bgray.config import ConfigError
from bgray.train import errors_in_one_line

if TYPE_CHECKING:
    from bgray.inference import Trained


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.apply", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", help="a run's folder, <results>/<name>/<id>")
    parser.add_argument("input", nargs="?", help="audio file, or MIDI for a piano-roll run")
    parser.add_argument(
        "--output",
        help="file to write; with several sources a folder (default: beside the input, "
        "<input>-<source>.wav)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.25,
        help="share of a chunk that it has in common with the next, 0 to 0.5 (default 0.25)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="best: by the run's own validation",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="N new piano rolls from random latents, as MIDI in --output (default: generated/)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --generate (default 0)")
    args = parser.parse_args(argv)
    with errors_in_one_line(resumes=False):
        _check(args)
        from bgray.context import pick_device
        from bgray.inference import load

        trained = load(args.run, pick_device(args.device), args.checkpoint)
        start = time.perf_counter()
        if args.generate is not None:
            written = generate(trained, args.generate, args.seed, args.output or "generated")
        elif trained.task.kind == "roll":
            written = reconstruct(trained, args.input, args.output)
        else:
            written = separate(trained, args.input, args.output, args.overlap)
        seconds = time.perf_counter() - start
        what = f"{trained.experiment.name} after {trained.step} steps ({args.checkpoint})"
        print(f"{what}, {seconds:.1f} s on {trained.device}:")
        for url in written:
            print(f"  {url}")


def _check(args: argparse.Namespace) -> None:
    problems = []
    if (args.input is None) == (args.generate is None):
        problems.append(("input", "give a file, or --generate N, and not both"))
    if not 0 <= args.overlap <= 0.5:
        problems.append(("--overlap", f"must be 0 to 0.5, got {args.overlap:g}"))
    if args.generate is not None and args.generate < 1:
        problems.append(("--generate", f"must be at least 1, got {args.generate}"))
    if problems:
        raise ConfigError("python -m bgray.apply", problems)


def separate(trained: "Trained", source: str, output: str | None, overlap: float) -> list[str]:
    """Write every source of an audio file at the file's own rate and length; returns the places."""
    from bgray.encoding import wav
    from bgray.inference import resample

    names = trained.task.sources
    places = {name: place(source, output, name, len(names), ".wav") for name in names}
    audio, rate = read_audio(source)
    wanted = trained.experiment.data.sample_rate
    if rate > wanted:
        print(f"the run works at {wanted} Hz: nothing above {wanted // 2} Hz will be left")
    estimate = trained(resample(audio, rate, wanted), overlap)  # (S, C, T)
    files = {}
    for name, sound in zip(names, estimate, strict=True):
        files[places[name]] = wav(_fit(resample(sound, wanted, rate), audio.shape[1]), rate)
    return _write(files)


def reconstruct(trained: "Trained", source: str, output: str | None) -> list[str]:
    """A MIDI file through a piano-roll run, piece by piece, as MIDI; a last short piece is
    followed by silence and cut again."""
    from bgray.midi import read_roll, write_midi

    url = place(source, output, "reconstruction", 1, ".mid")
    try:
        roll = read_roll(read_file(source))  # (P, T)
    except ValueError as error:
        raise ConfigError(source, [("", str(error))]) from None
    piece = trained.experiment.data.segment
    steps = roll.shape[1]
    padded = np.pad(roll, ((0, 0), (0, -steps % piece))).astype(np.float32)
    pieces = [trained(padded[:, i : i + piece])[0] for i in range(0, steps, piece)]
    notes = trained.task.notes(np.concatenate(pieces, axis=1)[:, :steps])
    return _write({url: write_midi(notes)})


def generate(trained: "Trained", count: int, seed: int, folder: str) -> list[str]:
    """New piano rolls from random latents, one MIDI file each."""
    import torch

    from bgray.midi import write_midi

    model: Any = trained.model
    if not hasattr(model, "generate"):
        name = trained.experiment.model.name
        raise ConfigError(trained.url, [("", f"{name} does not generate; only piano rolls do")])
    files = {}
    for i in range(count):
        generator = torch.Generator().manual_seed(seed + i)
        output = model.generate(trained.experiment.data.segment, generator)  # (1, 1, P, T)
        notes = trained.task.notes(output[0, 0].float().cpu().numpy())
        files[storage.join(folder, f"{seed + i:04d}.mid")] = write_midi(notes)
    return _write(files)


def read_audio(source: str) -> tuple[np.ndarray, int]:
    """(C, T) float32 and the sample rate in Hz; ConfigError where it is no audio."""
    import soundfile

    data = read_file(source)
    try:
        audio, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        text = f"no audio that can be read: {error.error_string}"
        raise ConfigError(source, [("", text)]) from None
    if not len(audio):
        raise ConfigError(source, [("", "is empty: no samples")])
    if not np.isfinite(audio).all():
        raise ConfigError(source, [("", "holds NaN or Inf")])
    return np.ascontiguousarray(audio.T), rate


def read_file(source: str) -> bytes:
    """ConfigError where there is no such file."""
    try:
        return storage.read_bytes(source)
    except FileNotFoundError:
        raise ConfigError(source, [("", "no such file")]) from None
    except IsADirectoryError:
        raise ConfigError(source, [("", "is a folder; give one file")]) from None


def place(source: str, output: str | None, name: str, count: int, suffix: str) -> str:
    """Where one source goes: `output` itself if it is the only one, else a file in that folder;
    by default beside the input. ConfigError rather than take the input's place, or write a file
    whose name says it is something else."""
    stem = Path(source.rsplit("/", 1)[-1]).stem
    if output is None:
        folder = source.rsplit("/", 1)[0] if "/" in source else "."
        return storage.join(folder, f"{stem}-{name}{suffix}")
    if count == 1 and not output.endswith("/") and not Path(output).is_dir():
        if not output.lower().endswith(suffix):
            raise ConfigError(output, [("--output", f"is written as {suffix}; name it so")])
        if Path(output).absolute() == Path(source).absolute():
            raise ConfigError(output, [("--output", "is the input itself; give another name")])
        return output
    if Path(output).is_file():
        text = f"is a file; give a folder for the {count} sources"
        raise ConfigError(output, [("--output", text)])
    return storage.join(output, f"{stem}-{name}{suffix}")


def _fit(audio: np.ndarray, length: int) -> np.ndarray:
    """(C, T) cut or followed by silence: resampling there and back can miss by a sample."""
    return np.pad(audio[:, :length], ((0, 0), (0, max(0, length - audio.shape[1]))))


def _write(files: dict[str, bytes]) -> list[str]:
    for url, content in files.items():
        storage.write_bytes(url, content)
    return list(files)


if __name__ == "__main__":
    main()
