"""launch/tpu_vm.sh: what it asks of gcloud, and that training is started, shown and restarted."""

import os
import shlex
import signal
import sys

import commands
import pytest
from fake_cloud import Cloud

RUN = ["--config=configs/gpt2.py:355m", "--workdir=gs://bucket/run"]
ODD = ['--config.training.sample_prompt=it\'s a "test" $HOME `id` \\ * ', "--x=", "--y=a\nb"]


def tpu(*options: str, kind: str = "v6e-8") -> list[str]:
    return ["--name=mine", f"--type={kind}", "--zone=us-east5-b", *options]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def test_makes_the_tpu_and_trains_with_arguments_as_they_are_given(cloud):
    code, out, err = cloud.run("tpu_vm.sh", *tpu("--project=p"), "--", *RUN, *ODD)
    assert code == 0, err
    assert out.splitlines() == ["step 1", "done"]
    assert cloud.trained() == [[*RUN, *ODD]]
    assert "[tpu,gcs]" in (cloud.folder / "pip.log").read_text()
    for ssh in cloud.calls("ssh"):  # or a host that is gone would be waited for
        assert "--ssh-flag=-oServerAliveInterval=30" in ssh
    (create,) = cloud.calls("create")
    assert create[:3] == ["tpu-vm", "create", "mine"]
    wanted = {"--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--zone=us-east5-b"}
    assert wanted | {"--project=p"} <= set(create) and "--spot" not in create
    assert all({"--zone=us-east5-b", "--project=p"} <= set(call) for call in cloud.calls())
    assert not cloud.calls("delete") and "is kept" in err


def test_a_tpu_that_is_there_is_used_again_and_deleted_on_request(cloud):
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)[0] == 0
    assert cloud.run("tpu_vm.sh", *tpu("--delete"), "--", *RUN)[0] == 0
    assert len(cloud.calls("create")) == 1 and len(cloud.trained()) == 2
    assert len(cloud.calls("delete")) == 1 and not cloud.state.exists()


def test_deleting_and_stopping_need_only_the_name_and_the_place(cloud):
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)[0] == 0
    where = ["--name=mine", "--zone=us-east5-b"]
    code, _, err = cloud.run("tpu_vm.sh", *where, "--stop")
    assert code == 0 and "worker.sh stop" in cloud.calls("ssh")[-1][-1], err
    code, _, err = cloud.run("tpu_vm.sh", *where, "--delete")
    assert code == 0 and not cloud.state.exists(), err
    code, _, err = cloud.run("tpu_vm.sh", *where, "--delete", "--", *RUN)
    assert code == 1 and "missing: --type" in err


def test_a_preempted_tpu_is_made_anew_and_the_same_command_goes_on(cloud):
    cloud.plan("preempted", "preempted", "0")
    code, out, err = cloud.run("tpu_vm.sh", *tpu("--spot"), "--", *RUN, *ODD)
    assert code == 0 and out.splitlines()[-1] == "done", err
    made = [call[1] for call in cloud.calls("create", "delete")]
    assert made == ["create", "delete", "create", "delete", "create"]
    assert "--spot" in cloud.calls("create")[0]
    assert cloud.trained() == [[*RUN, *ODD]] * 3


def test_a_preemption_during_the_installation_is_one_too(cloud):
    (cloud.folder / "interrupt").touch()
    code, _, err = cloud.run("tpu_vm.sh", *tpu("--spot"), "--", *RUN)
    assert code == 0, err
    assert len(cloud.calls("create")) == 2 and cloud.trained() == [RUN]


def test_an_installation_that_fails_is_not_tried_again(cloud):
    (cloud.root / "launch" / "worker.sh").write_text("exit 4\n")
    code, _, err = cloud.run("tpu_vm.sh", *tpu("--spot"), "--", *RUN)
    assert code == 1 and "could not be set up" in err
    assert len(cloud.calls("create")) == len(cloud.calls("scp")) == 1


def test_a_gcloud_that_is_not_set_up_is_said_at_once(cloud):
    (cloud.folder / "forbidden").touch()
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 1 and "not logged in" in err and "gcloud cannot look for mine" in err
    assert len(cloud.calls()) == 1


def test_preemptions_are_followed_only_so_often(cloud):
    cloud.plan("preempted", "preempted")
    code, _, err = cloud.run("tpu_vm.sh", *tpu("--spot", "--restarts=1"), "--", *RUN)
    assert code == 1 and "--restarts=1 allows no more" in err
    assert len(cloud.trained()) == 2


@pytest.mark.parametrize("options", [[], ["--spot"]])
def test_a_training_that_failed_is_not_tried_again(cloud, options):
    cloud.plan(status := "1")
    code, _, err = cloud.run("tpu_vm.sh", *tpu(*options, "--delete"), "--", *RUN)
    assert code == int(status) and f"ended with status {status}" in err
    assert len(cloud.trained()) == 1 == len(cloud.calls("delete"))


def test_an_interrupted_training_starts_again_on_the_same_tpu_until_it_says_1(cloud):
    """It knows who starts it, and so it can say that when it makes no progress."""
    cloud.plan("75", "143", "1")
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 1 and "ended with status 1" in err
    assert "status 75: started again, 1 of at most 100 times" in err and "status 143" in err
    assert len(cloud.calls("create")) == 1 and cloud.trained() == [RUN] * 3
    (launcher,) = set(cloud.launchers())
    assert "tpu_vm.sh on here" in launcher
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)[0] == 0
    assert len(set(cloud.launchers())) == 2  # a person gave the command again


def test_a_host_that_restarted_trains_again_on_the_same_tpu(cloud):
    cloud.plan("killed", "0")
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 0, err
    assert len(cloud.calls("create")) == 1 and cloud.trained() == [RUN, RUN]


def test_a_lost_connection_does_not_end_training(cloud):
    cloud.plan("disconnected")
    (cloud.folder / "disconnect").touch()
    code, out, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 0 and "done" in out and "connection was lost" in err
    assert len(cloud.trained()) == 1


def test_training_outlives_this_command_and_can_be_shown_again_and_stopped(cloud):
    cloud.plan("slow")
    process = cloud.start("tpu_vm.sh", *tpu(), "--", *RUN)
    assert process.stdout.readline() == "step 1\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on without this" in err

    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN, "--config.training.seed=1")
    assert code == 1 and "trains something else" in err

    again = cloud.start("tpu_vm.sh", *tpu(), "--", *RUN)
    assert again.stdout.readline() == "step 1\n"
    assert cloud.run("tpu_vm.sh", *tpu("--stop"))[0] == 0
    out, err = again.communicate(timeout=120)
    assert again.returncode == 143 and out == "saved\n" and "it runs already" in err
    assert len(cloud.trained()) == 1


def test_several_hosts_all_train_and_say_who_they_are(tmp_path):
    cloud = Cloud(tmp_path, hosts=2)
    code, out, err = cloud.run("tpu_vm.sh", *tpu(kind="v5p-16"), "--", *RUN)
    assert code == 0, err
    assert sorted(out.splitlines()) == [
        *("[host-0] done", "[host-0] step 1", "[host-1] done", "[host-1] step 1")
    ]
    assert cloud.trained() == [RUN, RUN]
    for call in cloud.calls("ssh", "scp"):
        assert {"--worker=all", "--batch-size=all"} <= set(call)


@pytest.mark.parametrize("statuses", [("0", "3"), ("75", "3")])
def test_one_host_that_fails_fails_all(tmp_path, statuses):
    cloud = Cloud(tmp_path, hosts=2)
    cloud.plan(*statuses)
    assert cloud.run("tpu_vm.sh", *tpu(kind="v5p-16"), "--", *RUN)[0] == 3


def test_slices_are_a_queued_resource_that_is_waited_for(tmp_path):
    cloud = Cloud(tmp_path, hosts=2)
    options = tpu("--node-count=2", "--reserved", "--with=--network=n", "--delete", kind="v4-8")
    code, _, err = cloud.run("tpu_vm.sh", *options, "--", *RUN)
    assert code == 0 and "PROVISIONING" in err, err
    (create,) = cloud.calls("create")
    assert create[0] == "queued-resources"
    wanted = {"--node-count=2", "--node-prefix=mine", "--runtime-version=tpu-ubuntu2204-base"}
    assert wanted | {"--reserved", "--network=n"} <= set(create)
    assert all("--node=all" in call for call in cloud.calls("ssh", "scp"))
    assert "--force" in cloud.calls("delete")[0]


def test_without_capacity_it_says_what_else_there_is_and_waits_only_after_a_preemption(cloud):
    (cloud.folder / "refusals").touch()
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 1 and "no more capacity" in err and "--queued" in err and not cloud.trained()
    cloud.plan("preempted", "0")
    first = cloud.start("tpu_vm.sh", *tpu("--spot"), "--", *RUN)
    assert first.stdout.readline() == "step 1\n"
    (cloud.folder / "refusals").touch()
    first.communicate(timeout=120)
    assert first.returncode == 0 and len(cloud.trained()) == 2


def test_a_tpu_of_another_type_is_left_alone(cloud):
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)[0] == 0
    code, _, err = cloud.run("tpu_vm.sh", *tpu("--spot", kind="v5p-8"), "--", *RUN)
    assert code == 1 and "mine is there, and is a v6e-8 and not a v5p-8" in err
    assert len(cloud.trained()) == 1 and not cloud.calls("delete")


@pytest.mark.parametrize("state", ["STOPPED", "FAILED"])
def test_a_tpu_in_another_state_is_left_alone(cloud, state):
    cloud.state.write_text(state)
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)
    assert code == 1 and f"mine is {state}" in err
    assert not cloud.calls("create", "delete", "ssh")


@pytest.mark.parametrize(
    "kind, count, shared",
    [("v5litepod-8", 1, False), ("v6e-16", 1, True), ("v5p-8", 1, False), ("v5p-8", 2, True)],
)
def test_hosts_must_share_the_workdir(cloud, kind, count, shared):
    options = tpu("--dry-run", f"--node-count={count}", kind=kind)
    args = [RUN[0], "--workdir", "runs/x"]
    code, _, err = cloud.run("tpu_vm.sh", *options, "--", *args)
    assert code == int(shared) and ("--workdir=gs://BUCKET/RUN" in err) == shared


@pytest.mark.parametrize(
    "args, said",
    [
        (["--nmae=x"], "no option '--nmae'; did you mean '--name'?"),
        (["--workdir=gs://b"], "--workdir goes to training: put -- before it"),
        (["--name=mine"], "missing: --type --zone"),
        (["--name"], "--name needs a value"),
        (["--zone="], "--zone is empty"),
        (["--spot=yes"], "--spot takes no value"),
        (["runs"], "unexpected 'runs'"),
        (tpu(), "nothing to train"),
        ([*tpu(), "--", "--config=configs/gpt2.py"], "give --workdir="),
        ([*tpu(), "--", RUN[1]], "give --config="),
        (
            [*tpu(), "--", RUN[1], "--config=configs/gtp2.py"],
            "there is no recipe 'configs/gtp2.py'",
        ),
        (tpu("--restarts=x"), "--restarts=x: a whole number of 0 or more"),
        (tpu("--node-count=0"), "--node-count=0: a whole number of 1 or more"),
        (tpu(kind="v5e-8"), "Google's name for it is v5litepod-8"),
        (tpu(kind="v5p:4x4x4"), "the type is v5p-128, whose number counts cores"),
        (tpu(kind="v5e:4x4"), "the type is v5litepod-16"),
        (tpu(kind="h100:8x4"), "give a type such as"),
        (tpu(kind="v5p-7"), "the number counts cores"),
        (tpu(kind="a100"), "give one such as"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(cloud, args, said):
    code, out, err = cloud.run("tpu_vm.sh", *args)
    assert (code, out) == (1, "") and err.startswith("error: ") and said in err
    assert not cloud.calls()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_arguments_of_training_are_checked_here_where_lm_jax_is_at_hand(cloud, more):
    python = cloud.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named lm_jax' >&2\nexit 1\n")
    python.chmod(0o755)
    wrong = [*RUN, "--config.mesh.dta=2"]
    assert cloud.run("tpu_vm.sh", *tpu("--dry-run"), "--", *wrong)[0] == 0  # none that could check
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (cloud.root / "lm_jax").symlink_to(commands.ROOT / "lm_jax")
    code, out, err = cloud.run("tpu_vm.sh", *tpu(*more), "--", *wrong)
    assert (code, out) == (1, "") and not cloud.calls()
    assert err.startswith("error: in the arguments of training: no config key 'mesh.dta'")
    assert "did you mean 'mesh.data'" in err
    right = [*RUN, "--config.mesh.data=2", "--config.data.sources=gs://bucket/text/"]
    code, out, err = cloud.run("tpu_vm.sh", *tpu("--dry-run"), "--", *right)
    assert code == 0 and "create mine" in out, err


def test_a_dry_run_prints_commands_that_a_shell_reads_back_and_runs_none(cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    options = tpu("--dry-run", "--queued", "--delete", kind="v5p-64")
    code, out, err = cloud.run("tpu_vm.sh", *options, "--", *RUN, *ODD[:2])
    assert code == 0 and not cloud.trained(), err
    lines = [shlex.split(line) for line in out.splitlines()]
    verbs = [line[4] for line in lines if line[0] == "gcloud"]
    assert verbs == ["create", "describe", "ssh", "scp", *["ssh"] * 4, "delete"]
    (start,) = (w[-1] for w in lines if "worker.sh start" in w[-1])
    assert shlex.split(start.removeprefix("--command="))[1:] == [
        *("bash", "lm_jax/launch/worker.sh", "start", *RUN, *ODD[:2])
    ]


def test_the_copy_leaves_out_what_is_not_needed(cloud):
    for path in (".venv/big", ".git/config", "runs/x/config.json", "lm_jax/runs/kept"):
        (cloud.root / path).parent.mkdir(parents=True, exist_ok=True)
        (cloud.root / path).touch()
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *RUN)[0] == 0
    there = cloud.folder / "hosts" / "0" / "lm_jax"
    assert (there / "launch" / "worker.sh").exists() and (there / "lm_jax/runs/kept").exists()
    assert not {".venv", ".git", "runs"} & {path.name for path in there.iterdir()}


@pytest.mark.parametrize("workdir", ["runs/x", "./out/x/", "configs/x"])
def test_what_training_wrote_is_there_when_the_same_command_goes_on(cloud, workdir):
    run = [RUN[0], f"--workdir={workdir}"]
    there, old = cloud.folder / "hosts" / "0" / "lm_jax", "configs/old recipe.py"
    (cloud.root / old).touch()
    assert cloud.run("tpu_vm.sh", *tpu(), "--", *run)[0] == 0
    checkpoint = there / workdir / "checkpoints" / "4"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of the host")
    (there / "notes").touch()
    assert (there / old).exists()

    (cloud.root / old).unlink()  # the code changes, and someone has trained here as well
    (cloud.root / "configs" / "new.py").touch()
    (cloud.root / workdir / "checkpoints").mkdir(parents=True)
    (cloud.root / workdir / "checkpoints" / "4").write_text("of another run")
    code, _, err = cloud.run("tpu_vm.sh", *tpu(), "--", *run)
    assert code == 0 and cloud.trained() == [run, run], err
    assert checkpoint.read_text() == "of the host" and (there / "notes").exists()
    assert (there / "configs" / "new.py").exists() and not (there / old).exists()


def test_a_signal_to_all_processes_of_a_host_is_trainings_to_answer(cloud):
    """As when the machine is shut down: the status that is written down is training's own. Nobody
    asked for a stop, so that it goes on."""
    cloud.plan("slow", "0")
    process = cloud.start("tpu_vm.sh", *tpu(), "--", *RUN)
    assert process.stdout.readline() == "step 1\n"
    run = cloud.folder / "hosts" / "0" / "lm_jax-run"
    for name in ("process", "child"):
        os.kill(int((run / name).read_text().split()[0]), signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "saved\nstep 1\ndone\n"
    assert "status 143: started again" in err and len(cloud.trained()) == 2


# Pip and uv of a host whose own Python is 3.10.
_OLD_PYTHON = """#!/bin/sh
case "$*" in
  "-m pip install"*uv) mkdir -p "$HOME/.local/bin" && cp '{uv}' "$HOME/.local/bin/uv" ;;
  *) echo 3 10 ;;
esac
"""
_UV = """#!/bin/sh
case "$1 $2" in
  "python install") touch "$HOME/brought" ;;
  "python find") [ -e "$HOME/brought" ] && echo '{python}' ;;
esac
"""


def test_a_host_with_an_old_python_gets_a_newer_one(cloud, tmp_path):
    (tmp_path / "uv").write_text(_UV.format(python=tmp_path / "bin" / "python"))
    (tmp_path / "uv").chmod(0o755)
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        cloud.program(f"old/{name}", _OLD_PYTHON.format(uv=tmp_path / "uv"))
    (tmp_path / "home").mkdir()
    path = f"{tmp_path / 'bin' / 'old'}:{os.environ['PATH']}"
    code, _, err = cloud.run("worker.sh", "install", PATH=path, HOME=f"{tmp_path}/home", PYTHON="")
    assert code == 0, err
    assert (tmp_path / "lm_jax-venv" / "bin" / "python").exists()
    assert "[tpu,gcs]" in (tmp_path / "pip.log").read_text()
