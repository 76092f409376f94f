"""What holds for each script: ShellCheck has nothing to say, and --help names every option."""

import os
import pathlib
import re
import subprocess
import sys

import commands
import pytest

LAUNCH = commands.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), commands.ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run(
        [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", script],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_help_says_what_each_option_is(name):
    text = (LAUNCH / name).read_text()
    options = " ".join(re.findall(r'^(?:OPTIONS|SWITCHES)="(.*)"$', text, re.MULTILINE)).split()
    told = subprocess.run([LAUNCH / name, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "dry-run" in options
    for option in options:
        assert re.search(rf"--{option}\b", told.stdout), option
    assert not told.stdout.startswith("#") and "set -euo" not in told.stdout


def test_those_that_are_called_can_be_called():
    for script in SCRIPTS:
        sourced = script.name in ("common.sh", "environment.sh")
        assert os.access(script, os.X_OK) != sourced, script.name


ODD = (
    "",
    " ",
    "a b",
    "it's",
    '"',
    "$HOME",
    "`id`",
    "\\",
    "a\nb\n",
    "*",
    "~",
    "é",
    "-n",
    "a;b",
    "'",
)


def test_quoted_words_come_back_as_they_were():
    common = LAUNCH / "common.sh"
    again = f'source "{common}"; eval "set -- $(quoted "$@")"; printf "%s\\0" "$@"'
    got = subprocess.run(["bash", "-euc", again, "bash", *ODD], capture_output=True, text=True)
    assert got.stdout.split("\0")[:-1] == list(ODD), got.stderr
