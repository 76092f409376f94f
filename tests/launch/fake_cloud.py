"""A copy of the scripts, and a cloud that is a folder: gcloud and training are played in it.

state             of the TPU; no such file: there is no TPU
hosts/K/          the home of host K
calls             what gcloud was called with, a JSON list a line
trained           a line for each start of training on a host: its arguments
launchers         the same: who says that it makes this start
plan              how training goes, one line a start: an exit status, or 'preempted', 'killed',
                  'disconnected', 'slow'; when there are no more lines, it succeeds
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import commands

_GCLOUD = """#!{python} -SI
import json, os, pathlib, shutil, subprocess, sys, time
args, cloud = sys.argv[1:], pathlib.Path('{cloud}')
with open(cloud / "calls", "a") as f:
    print(json.dumps(args), file=f)
assert args[:2] == ["compute", "tpus"], args
kind, verb, rest = args[2], args[3], args[4:]
flags = dict(a[2:].partition("=")[::2] for a in rest if a.startswith("--"))
words = [a for a in rest if not a.startswith("--")]
state, hosts = cloud / "state", cloud / "hosts"
ready = dict([("tpu-vm", "READY"), ("queued-resources", "ACTIVE")])[kind]
if (cloud / "forbidden").exists():
    sys.exit("ERROR: you are not logged in")
if not state.exists() and verb != "create":
    sys.exit("ERROR: NOT_FOUND: there is no " + words[0])
if verb == "create":
    refusals = cloud / "refusals"
    if refusals.exists():
        refusals.unlink()
        sys.exit("ERROR: RESOURCE_EXHAUSTED: no more capacity")
    for k in range({hosts}):
        (hosts / str(k)).mkdir(parents=True)
    (cloud / "type").write_text(flags["accelerator-type"])
    state.write_text("PROVISIONING" if kind == "queued-resources" else ready)
elif verb == "describe":
    now = state.read_text()
    print(now, (cloud / "type").read_text() if (cloud / "type").exists() else "", sep="\\t")
    if now == "PROVISIONING":
        state.write_text(ready)
elif verb == "delete":
    state.unlink()
    shutil.rmtree(hosts)
elif state.read_text() != ready:
    sys.exit("ERROR: not in state " + ready)
elif verb == "scp":
    source, (name, _, to) = words[0], words[1].partition(":")
    for home in hosts.iterdir():
        shutil.copy(source, home / to)
elif verb == "ssh":
    codes = []
    for home in sorted(hosts.iterdir()):
        env = os.environ | dict(HOME=str(home), FAKE_HOST="host-" + home.name)
        if " follow" in flags["command"] and (cloud / "disconnect").exists():
            (cloud / "disconnect").unlink()
            print("step 1")
            sys.exit(255)
        codes.append(subprocess.run(["sh", "-c", flags["command"]], cwd=home, env=env).returncode)
    sys.exit(next((c for c in codes if c), 0))
else:
    sys.exit("ERROR: what is " + verb)
"""
# Installs nothing; trains as the plan says.
_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  "-m pip")
    echo "$*" >>'{cloud}/pip.log'
    if [ -e '{cloud}/interrupt' ]; then
      rm '{cloud}/interrupt'
      echo PREEMPTED >'{cloud}/state'
      exit 1
    fi ;;
  "-m lm_jax.train")
    shift 2
    cd '{cloud}'
    '{python}' -SIc 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >>trained
    echo "$LM_JAX_RESTARTED_BY" >>launchers
    until mkdir lock 2>/dev/null; do sleep 0.01; done # hosts start at the same time
    how=$(head -n 1 plan 2>/dev/null)
    [ ! -e plan ] || {{ sed 1d plan >plan.new; mv plan.new plan; }}
    rmdir lock
    echo "step 1"
    case $how in
      preempted) echo PREEMPTED >state; exit 1 ;;
      killed) rm hosts/0/lm_jax-run/process; echo "0 elsewhere" >hosts/0/lm_jax-run/process
              kill -9 $PPID; exit 1 ;;
      slow) trap 'echo saved; exit 143' TERM
            n=0; while [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done ;;
      disconnected) sleep 0.3 ;;
      0) ;;
      ?*) exit "$how" ;;
    esac
    echo "done" ;;
  *) exec '{python}' "$@" ;;
esac
"""

# Where tests are run in the background SIGINT may be ignored, and bash cannot change that itself.
_BASH = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""


class Cloud:
    """The scripts in a folder whose name has a space, and programs of the cloud on the PATH."""

    def __init__(self, folder: pathlib.Path, hosts: int = 1):
        self.root, self.state = folder / "a copy", folder / "state"
        self.folder = folder
        for name in ("launch", "configs"):
            shutil.copytree(commands.ROOT / name, self.root / name)
        shutil.copy(commands.ROOT / "pyproject.toml", self.root)
        values = {"python": sys.executable, "cloud": folder, "hosts": hosts}
        self.program("gcloud", _GCLOUD.format(**values))
        self.program("python", _PYTHON.format(**values))
        self.program("hostname", '#!/bin/sh\necho "${FAKE_HOST:-here}"\n')

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *args: str, **variables: str) -> subprocess.Popen:
        unset = ("VENV", "LM_JAX_EXTRAS", "PYTHON", "LM_JAX_PREFIX", "LM_JAX_RESTARTED_BY")
        env = {k: v for k, v in os.environ.items() if k not in unset} | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "bin" / "python"),
            "LM_JAX_POLL": "0.02",
        }
        return subprocess.Popen(
            [sys.executable, "-SIc", _BASH, self.root / "launch" / script, *args],
            cwd=self.folder,
            env=env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *args: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *args, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def plan(self, *how: str) -> None:
        (self.folder / "plan").write_text("".join(f"{line}\n" for line in how))

    def trained(self) -> list[list[str]]:
        """The arguments of each start of training."""
        return self._lines("trained")

    def launchers(self) -> list[str]:
        """Who says that it makes a start, of each start of training."""
        return (self.folder / "launchers").read_text().splitlines()

    def calls(self, *verbs: str) -> list[list[str]]:
        """What gcloud was called with, 'compute tpus' left out."""
        calls = [call[2:] for call in self._lines("calls")]
        return [call for call in calls if not verbs or call[1] in verbs]

    def _lines(self, name: str) -> list[list[str]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
