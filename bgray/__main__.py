"""`python -m bgray`: the commands, one line each."""

COMMANDS = {
    "shards": "audio files, stems or built-in music -> Parquet shards; --list, --verify",
    "train": "one experiment: here with --local, or on Ray Train; --describe",
    "sweep": "many experiments on Ray Tune; run again to continue; --dry shows what it would do",
    "bench": "measure this machine",
}

if __name__ == "__main__":
    print("bgray: sweeps you can trust for audio models\n")
    for name, text in COMMANDS.items():
        print(f"  python -m bgray.{name:7} {text}")
    print("\nEach takes --help. Start with: python -m bgray.sweep sweeps/quickstart.yaml")
