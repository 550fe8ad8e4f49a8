"""`python -m bgray`: the commands, one line each."""

COMMANDS = {
    "shards": "audio files, stems or built-in music -> Parquet shards; --list, --verify",
    "train": "one experiment: here with --local, or on Ray Train; --describe",
    "sweep": "many experiments on Ray Tune; run again to continue; --dry shows what it would do",
    "compare": "variants against their baseline: better, worse, or can't tell yet",
    "dashboard": "a live page: table, listening, curves, details of every trial; blind tests",
    "report": "sweeps as REPORT.md, report.html and report.json; ear notes stay",
    "evaluate": "trained runs on whole tracks: BSSEval v4, uSDR, SI-SDR, box plots",
    "apply": "a trained run on an audio or MIDI file; --generate for new piano rolls",
    "oracle": "what the mixture's phase allows, and which STFT window is best (sweep runs it too)",
    "cluster": "check, wait for, submit to, stop and end the cluster that `ray up` starts",
    "bench": "measure this machine",
}

if __name__ == "__main__":
    print("bgray: sweeps you can trust for audio models\n")
    for name, text in COMMANDS.items():
        print(f"  python -m bgray.{name:8} {text}")
    print("\nEach takes --help. Start with: python -m bgray.sweep sweeps/quickstart.yaml")
