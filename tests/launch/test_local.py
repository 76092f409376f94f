"""The launch scripts, with an interpreter that notes what it is asked for and installs nothing."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest

_INTERPRETER = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  "-m pip")
    echo "$*" >>'{log}'
    case "${{PIP:-}}" in
      hang) exec sleep 60 ;;
      ?*) echo "$PIP" ; exit 1 ;;
    esac ;;
  "-m "*) shift ; printf '%s\\n' "$PWD" "$@" ;;
  *) exec '{python}' "$@" ;;
esac
"""


# What the scripts need besides Python.
_TOOLS = (
    *("awk", "basename", "bash", "cat", "cksum", "cp", "df", "dirname", "env", "find", "grep"),
    *("ls", "mkdir", "rm", "sed", "sh", "tail", "touch", "tr"),
)


class Checkout:
    """The scripts alone, in a folder whose name has a space."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.log = folder / "a copy", folder / "pip.log"
        shutil.copytree(commands.ROOT / "launch", self.root / "launch")
        shutil.copytree(commands.ROOT / ".ci", self.root / ".ci")
        shutil.copy(commands.ROOT / "pyproject.toml", self.root)
        self.python = folder / "python3.12"
        self.python.write_text(_INTERPRETER.format(log=self.log, python=sys.executable))
        self.python.chmod(0o755)

    def start(self, script: str, *args: str, cwd: pathlib.Path | None = None, **env: str):
        inherited = {k: v for k, v in os.environ.items() if k not in ("VENV", "LM_JAX_EXTRAS")}
        inherited["CHROMIUM"] = sys.executable  # so that none is installed
        return subprocess.Popen(
            ["bash", self.root / script, *args],
            cwd=cwd or self.root,
            env=inherited | {"PYTHON": str(self.python)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that all of it can be killed
        )

    def run(self, script: str, *args: str, **options) -> tuple[int, list[str], str]:
        process = self.start(script, *args, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.splitlines(), err

    def installs(self) -> list[str]:
        """What pip was asked to install, one a line."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.partition("--editable ")[2].removeprefix(str(self.root)) for line in lines]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


QUICKSTART = ["--config=configs/quickstart.py", "--workdir=runs/quickstart"]


def test_installs_once_and_trains_the_quickstart(checkout):
    expected = [str(checkout.root), "lm_jax.train", *QUICKSTART, "--config.training.steps=5"]
    code, out, err = checkout.run("launch/local.sh", "--config.training.steps=5")
    assert (code, out) == (0, expected) and "installing lm_jax" in err
    assert checkout.run("launch/local.sh", "--config.training.steps=5") == (0, expected, "")
    assert checkout.installs() == [""]


def test_an_environment_that_is_taken_from_another_checkout_is_said_to_be(checkout):
    checkout.run("launch/local.sh")
    state = checkout.root / ".venv" / "lm_jax-installed"
    state.write_text(state.read_text().replace(str(checkout.root), "/other/check out", 1))
    _, _, err = checkout.run("launch/local.sh")
    assert (
        f"had the code in /other/check out installed: from now on it has that in {checkout.root}"
        in err
    )


@pytest.mark.parametrize(
    "given, added",
    [
        (["--workdir=w"], QUICKSTART[:1]),
        (["--workdir", "w"], QUICKSTART[:1]),
        (["--config=configs/gpt2.py"], []),
        (["--config=configs/gpt2.py:355m", "--workdir=w"], []),
        (["--config.model.layers=2"], QUICKSTART),
    ],
)
def test_a_default_gives_way_to_what_the_user_gives(checkout, given, added):
    _, out, _ = checkout.run("launch/local.sh", *given)
    assert out[2:] == added + given


def test_runs_from_anywhere_with_paths_relative_to_the_user(checkout, tmp_path):
    _, out, _ = checkout.run("launch/local.sh", "--config.data.sources=text.txt", cwd=tmp_path)
    assert out == [
        str(tmp_path),
        "lm_jax.train",
        f"--config={checkout.root}/configs/quickstart.py",
        f"--workdir={checkout.root}/runs/quickstart",
        "--config.data.sources=text.txt",
    ]
    assert (checkout.root / ".venv").is_dir()


def test_extras_add_up_and_a_changed_project_is_installed_again(checkout):
    checkout.run("launch/local.sh", LM_JAX_EXTRAS="cuda,wandb")
    checkout.run("launch/local.sh")
    checkout.run("launch/test.sh")
    checkout.run("launch/local.sh", LM_JAX_EXTRAS="wandb")
    assert checkout.installs() == ["[cuda,wandb]", "[cuda,wandb,test]"]
    with open(checkout.root / "pyproject.toml", "a") as f:
        f.write("# another\n")
    checkout.run("launch/local.sh")
    assert checkout.installs()[2:] == ["[cuda,wandb,test]"]


@pytest.mark.parametrize(
    "said, why",
    [
        ("[Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError: name resolution", "check the network"),
        ("No matching distribution found", "could not install lm_jax"),
    ],
)
def test_a_failed_installation_is_explained_and_not_trusted(checkout, said, why):
    code, out, err = checkout.run("launch/local.sh", PIP=said)
    assert code == 1 and out == [] and said in err and why in err
    assert checkout.run("launch/local.sh")[0] == 0
    assert len(checkout.installs()) == 2


def test_an_installation_that_was_cut_off_is_not_trusted(checkout):
    process = checkout.start("launch/local.sh", PIP="hang")
    deadline = time.monotonic() + 30
    while not checkout.installs() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    left = checkout.root / ".venv" / "left over"
    left.touch()
    code, out, _ = checkout.run("launch/local.sh")
    assert code == 0 and out[1] == "lm_jax.train"
    assert not left.exists(), "it was to be made anew"


def test_one_installation_at_a_time_and_help_is_none(checkout):
    process = checkout.start("launch/local.sh", PIP="hang")
    while not checkout.log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    try:
        code, _, err = checkout.run("launch/local.sh")
        assert code == 1 and f"is being made by process {process.pid}: wait for it" in err, err
        code, out, _ = checkout.run("launch/local.sh", "--help")
        assert code == 0 and "launch/local.sh [--config=FILE.py" in "\n".join(out)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_an_environment_whose_interpreter_is_gone_is_made_anew(checkout):
    assert checkout.run("launch/local.sh")[0] == 0
    shutil.rmtree(checkout.root / ".venv" / "bin")
    (checkout.root / ".venv" / "pyvenv.cfg").unlink()
    code, _, err = checkout.run("launch/local.sh")
    assert code == 0 and "installing lm_jax" in err


def test_interpreters_that_do_not_run_or_are_too_old_are_passed_over(checkout, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3.13").write_text("#!/bin/sh\nexit 127\n")
    (folder / "python3.11").write_text("#!/bin/sh\necho 3 10\n")
    for name in ("python3.13", "python3.11"):
        (folder / name).chmod(0o755)
    for tool in _TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    alone = {"PYTHON": "", "PATH": str(folder)}
    code, _, err = checkout.run("launch/local.sh", **alone)
    assert code == 1 and "needs Python 3.11 or newer" in err
    assert "python3.13 does not run" in err and "python3.11 is Python 3.10" in err

    (folder / "python3").symlink_to(checkout.python)
    assert checkout.run("launch/local.sh", **alone)[0] == 0
    code, _, err = checkout.run("launch/local.sh", PYTHON=str(folder / "python3.11"))
    assert code == 1 and "is Python 3.10; lm_jax needs Python 3.11" in err


def test_a_folder_that_is_no_environment_is_left_alone(checkout, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    code, _, err = checkout.run("launch/local.sh", VENV="mine", cwd=tmp_path)
    assert code == 1 and "is no virtual environment" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


@pytest.mark.parametrize("script", ["launch/test.sh", ".ci/run"])
def test_tests_run_from_the_root_after_ruff(checkout, tmp_path, script):
    code, out, _ = checkout.run(script, cwd=tmp_path)
    assert code == 0 and checkout.installs() == ["[test]"]
    root = str(checkout.root)
    ruff = [root, "ruff", "check", "lm_jax", "tests"]
    ruff += [root, "ruff", "format", "--check", "lm_jax", "tests"]
    pytest_flags = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert out == [*ruff, root, "pytest", *pytest_flags]
    assert os.access(checkout.root / script, os.X_OK)


def _alone(folder: pathlib.Path, **programs: str) -> dict[str, str]:
    """Variables of a machine that has the usual tools, these shell scripts, and no Chromium."""
    folder.mkdir()
    for tool in _TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    for name, script in programs.items():
        (folder / name.replace("_", "-")).write_text("#!/bin/sh\n" + script)
        (folder / name.replace("_", "-")).chmod(0o755)
    return {"CHROMIUM": "", "PATH": str(folder)}


@pytest.mark.parametrize(
    "user, sudo, installs",
    [(0, "exit 1", True), (1000, 'shift; "$@"', True), (1000, "exit 1", False)],
    ids=["root", "sudo", "user"],
)
def test_a_browser_is_installed_where_that_can_be_done(checkout, tmp_path, user, sudo, installs):
    folder = tmp_path / "bin"
    apt = f'echo "$*" >>{tmp_path}/apt.log; [ "$1" = update ] || cp /bin/sh {folder}/chromium\n'
    alone = _alone(folder, id=f"echo {user}\n", sudo=sudo, apt_get=apt)
    code, out, err = checkout.run("launch/test.sh", **alone)
    assert code == 0 and "pytest" in out
    assert ("installing Chromium" in err) == installs == ("apt-get install chromium" not in err)
    again = checkout.run("launch/test.sh", **alone)[2]
    assert again == ("" if installs else err.splitlines(keepends=True)[-1])
    log = tmp_path / "apt.log"
    asked = ["update -qq", "install -y -qq --no-install-recommends chromium"]
    assert (log.read_text().splitlines() if log.exists() else []) == (asked if installs else [])


def test_without_a_way_to_a_browser_it_says_so_and_tests(checkout, tmp_path):
    failing = "echo unable to locate package; exit 100\n"
    for folder, programs, why in (
        ("no apt", {"id": "echo 0\n"}, "note: no Chromium here"),
        ("apt fails", {"id": "echo 0\n", "apt_get": failing}, "unable to locate package\nnote: no"),
    ):
        code, out, err = checkout.run("launch/test.sh", **_alone(tmp_path / folder, **programs))
        assert code == 0 and "pytest" in out and why in err, folder
    code, _, err = checkout.run("launch/test.sh", CHROMIUM="no-such-browser")
    assert code == 1 and "error: CHROMIUM=no-such-browser" in err
