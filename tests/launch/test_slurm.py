"""launch/slurm.sh: the job that sbatch is given does what was asked; Slurm is played."""

import subprocess

import pytest
from fake_cloud import Cloud

RUN = ["--config=configs/gpt2.py", "--workdir=runs/x", "--config.training.sample_prompt=it's $5"]
# Prints the words of the step that it would start on the nodes, and runs it here, once.
_SRUN = """#!/bin/sh
while :; do case $1 in -*) echo "srun $1"; shift ;; *) break ;; esac; done
exec "$@"
"""


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    cloud = Cloud(tmp_path)
    cloud.program("sbatch", f"#!/bin/sh\nprintf '%s\\n' \"$@\"\ncat >'{tmp_path}/job'\n")
    cloud.program("srun", _SRUN)
    cloud.program("scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    return cloud


def submit(cloud: Cloud, *options: str) -> list[str]:
    code, out, err = cloud.run("slurm.sh", *options, "--", *RUN)
    assert code == 0, err
    return out.splitlines()


def run_job(cloud: Cloud, restarts: int = 0) -> tuple[int, list[str]]:
    """The job's script as its first node runs it."""
    env = {"PATH": f"{cloud.folder / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    ended = subprocess.run(
        ["bash", cloud.folder / "job"], env=env, cwd=cloud.folder, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout.splitlines()


def test_the_job_has_a_process_a_gpu_and_is_requeued(cloud):
    flags = submit(cloud, "--nodes=4", "--gpus=2", "--time=1:00:00", "--with=--qos=low")
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue"} <= set(flags)
    assert {"--signal=TERM@120", "--time=1:00:00", "--qos=low"} <= set(flags)
    assert not any(flag.startswith(("--gpus-per-task", "--partition")) for flag in flags)
    assert "[cuda]" in (cloud.folder / "pip.log").read_text()


def test_the_job_trains_with_arguments_as_they_are_given(cloud):
    submit(cloud)
    code, out = run_job(cloud)
    assert code == 0 and cloud.trained() == [RUN]
    assert "srun --kill-on-bad-exit=0" in out and "scontrol requeue 7" not in out


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [
        *(("143", 0, True), ("143", 3, False), ("75", 2, True), ("137", 0, True)),
        *(("1", 0, False), ("130", 0, False)),
    ],
)
def test_a_run_that_failed_is_not_put_back_and_one_that_was_interrupted_is(
    cloud, status, restarts, requeued
):
    submit(cloud, "--restarts=3")
    cloud.plan(status)
    code, out = run_job(cloud, restarts)
    assert code == int(status) and ("scontrol requeue 7" in out) == requeued


def test_training_knows_which_job_starts_it_so_that_it_ends_without_progress(cloud):
    submit(cloud)
    cloud.plan("75", "143", "75", "1")  # as training ends when it refuses
    ended = [run_job(cloud, restarts) for restarts in range(4)]
    assert ["scontrol requeue 7" in out for _, out in ended] == [True, True, True, False]
    assert cloud.launchers() == ["slurm job 7"] * 4


def test_a_dry_run_prints_what_would_be_submitted(cloud):
    flags = submit(cloud, "--nodes=2")
    job = (cloud.folder / "job").read_text()
    (cloud.folder / "pip.log").unlink()
    for name in ("sbatch", "python"):
        (cloud.folder / "bin" / name).unlink()
    printed = "\n".join(submit(cloud, "--nodes=2", "--dry-run"))
    head, body = printed.split(" <<'SCRIPT'\n")
    assert head.split() == ["sbatch", *flags] and body == job + "SCRIPT"
    assert not (cloud.folder / "pip.log").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (["--node=2"], "no option '--node'; did you mean '--nodes'?"),
        (["--gpus=many"], "--gpus=many: a whole number of 1 or more"),
        (["--nodes=2"], "nothing to train"),
        (["--nodes=2", "--", RUN[0], "--workdir=/tmp/x"], "another folder on each of the 2 nodes"),
    ],
)
def test_mistakes_are_named(cloud, args, said):
    code, out, err = cloud.run("slurm.sh", *args)
    assert (code, out) == (1, "") and err.startswith("error: ") and said in err
