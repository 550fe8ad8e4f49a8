"""The README's commands and names exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m bgray\.(\w+)((?: +[^\s`#]+)*)", README)))


def test_the_two_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("uv run python -m bgray.sweep sweeps/quickstart.yaml", "uv run pytest"):
        assert f"pip install uv && {command}" in README
        assert command in ci


@pytest.mark.parametrize("module", sorted({module for module, _ in COMMANDS}))
def test_every_command_exists_and_knows_the_flags_it_is_shown_with(module):
    shown, helps = set(), [[]]
    for _, words in (item for item in COMMANDS if item[0] == module):
        shown |= set(re.findall(r"--[a-z]+", words))
        if module in ("cluster", "bench"):  # its flags belong to its commands
            helps.append([words.split()[0]])
    known = ""
    for words in helps:
        out = subprocess.run(
            [sys.executable, "-m", f"bgray.{module}", *words, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert out.returncode == 0
        known += out.stdout
    for flag in shown:
        assert flag in known, f"bgray.{module} does not know {flag}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"sweeps/\w+\.yaml", README))))
def test_every_sweep_that_is_named_exists(path):
    assert (ROOT / path).is_file()


def test_the_file_table_names_every_module():
    table = README.split("## Files")[1]
    for path in (ROOT / "bgray").glob("*.py"):
        if not path.name.startswith("__"):
            assert path.name in table, f"{path.name} is not in the README's table of files"


def test_the_example_experiment_is_valid():
    from bgray.experiment import resolve

    text = README.split("```yaml")[1].split("```")[0]
    raw = yaml.safe_load(text)
    raw["data"]["path"] = "builtin"
    assert resolve(raw, "README.md").schedule.name == "wsd"


def test_the_commands_are_listed_by_the_package_itself():
    main = importlib.import_module("bgray.__main__")
    assert {module for module, _ in COMMANDS} <= set(main.COMMANDS)


def test_pinned_requirements_name_no_index_and_hold_what_the_project_asks_for():
    text = (ROOT / "requirements.txt").read_text()
    assert "http" not in text.replace("aiohttp", "").replace("httpx", "").replace("httpcore", "")
    assert "ray==2.60.0" in text
