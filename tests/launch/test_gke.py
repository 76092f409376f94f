"""launch/gke.sh: the manifest is what was asked for, and what kubectl is given."""

import shlex

import commands
import pytest
import yaml
from fake_cloud import Cloud

from lm_jax.errors import WRONG
from lm_jax.training.starts import VARIABLE

RUN = ["--config=configs/gpt2.py", "--workdir=gs://bucket/run"]
ODD = ['--x=it\'s "so" \\n {{NAME}} $HOME: # & *', "--y=a\nb\tc", "--z="]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def job(*options: str, kind: str = "v5p-128") -> list[str]:
    return ["--name=mine", f"--type={kind}", "--image=repo/image:1", *options, "--", *RUN, *ODD]


def manifest(cloud: Cloud, *options: str, kind: str = "v5p-128") -> tuple[dict, dict, dict]:
    """The JobSet, the job of a slice, and its pods' specification."""
    code, out, err = cloud.run("gke.sh", "--dry-run", *job(*options, kind=kind))
    assert code == 0, err
    jobset = yaml.safe_load(out)
    (slices,) = jobset["spec"]["replicatedJobs"]
    return jobset, slices, slices["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "kind, options, accelerator, topology, hosts, chips",
    [
        ("v4-8", [], "tpu-v4-podslice", "2x2x1", 1, 4),
        ("v5litepod-1", [], "tpu-v5-lite-podslice", "1x1", 1, 1),
        ("v5litepod-16", [], "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v6e-8", ["--chips-per-host=8"], "tpu-v6e-slice", "2x4", 1, 8),
        ("v6e-256", [], "tpu-v6e-slice", "16x16", 64, 4),
        ("v5p-128", [], "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v5p-1536", ["--topology=8x8x12"], "tpu-v5p-slice", "8x8x12", 192, 4),
        ("tpu7x-128", [], "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_a_slice_has_a_pod_for_each_host(cloud, kind, options, accelerator, topology, hosts, chips):
    jobset, slices, pod = manifest(cloud, "--slices=3", "--restarts=7", *options, kind=kind)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7 and slices["replicas"] == 3
    of_job = slices["template"]["spec"]
    assert of_job["parallelism"] == of_job["completions"] == hosts and of_job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": chips}


def test_what_failed_is_final_and_all_else_starts_again(cloud):
    jobset, slices, pod = manifest(cloud)
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (of_pods,) = slices["template"]["spec"]["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert of_pods["action"] == "FailJob" and pod["restartPolicy"] == "Never"
    codes = of_pods["onExitCodes"]
    assert codes == {"containerName": container["name"], "operator": "In", "values": [WRONG]}
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert variables[VARIABLE] == "JobSet mine"


def test_arguments_reach_the_container_as_they_are(cloud):
    jobset, _, pod = manifest(cloud)
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "lm_jax.train"]
    assert container["args"] == [*RUN, *ODD] and container["image"] == "repo/image:1"
    assert jobset["metadata"]["name"] == "mine" and pod["restartPolicy"] == "Never"


def test_what_is_not_asked_for_is_not_there(cloud):
    options = ["--spot", "--service-account=writer", "--queue=line", "--namespace=team"]
    jobset, _, pod = manifest(cloud, *options)
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert any(t["key"] == "cloud.google.com/gke-spot" for t in pod["tolerations"])
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "line"
    assert jobset["metadata"]["namespace"] == "team"
    jobset, _, pod = manifest(cloud)
    assert "serviceAccountName" not in pod and "spot" not in str(pod)
    assert "kueue" not in str(jobset) and jobset["metadata"]["namespace"] == "default"


def test_the_xpk_command_stands_beside_it(cloud):
    options = ["--dry-run", "--slices=2", "--spot", "--cluster=c"]
    _, out, _ = cloud.run("gke.sh", *job(*options)[:-1])
    comments = []
    for line in out.splitlines():
        if not line.startswith("# "):
            break
        comments.append(line[2:])
    xpk = shlex.split("\n".join(comments[:2]))  # an argument has a newline
    assert xpk[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--workload=mine", "--tpu-type=v5p-128", "--num-slices=2"} <= set(xpk)
    assert {"--docker-image=repo/image:1", "--spot"} <= set(xpk)
    command = xpk[-1].removeprefix("--command=")
    assert shlex.split(command) == ["python", "-m", "lm_jax.train", *RUN, *ODD[:-1]]


def test_kubectl_gets_the_manifest(cloud):
    cloud.program("kubectl", f"#!/bin/sh\necho \"$@\"\ncat >'{cloud.folder}/applied'\n")
    code, out, err = cloud.run("gke.sh", *job())
    assert code == 0 and out == "apply -f -\n" and "kubectl logs" in err
    _, printed, _ = cloud.run("gke.sh", "--dry-run", *job())
    assert (cloud.folder / "applied").read_text() == printed
    cloud.program("kubectl", "#!/bin/sh\nexit 3\n")
    assert cloud.run("gke.sh", *job())[0] == 3


def test_the_image_is_made_of_what_is_there():
    lines = (commands.ROOT / "launch" / "gke" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"lm_jax", "configs", "pyproject.toml"} <= set(copied)
    assert all((commands.ROOT / path).exists() for path in copied)


@pytest.mark.parametrize(
    "args, said",
    [
        (["--typ=x"], "did you mean '--type'?"),
        (["--name=mine"], "missing: --type --image"),
        (job("--topology=4x4x8"), "--topology=4x4x8 is not one of 64 chips"),
        (job("--topology=4x4x"), "--topology=4x4x is not one of"),
        (job(kind="v5p-24"), "no usual topology for 12 chips: give --topology=AxBxC"),
        (job(kind="v6e-24"), "give --topology=AxB"),
        (job("--chips-per-host=3"), "does not divide the 64 chips"),
        (job("--slices=0"), "--slices=0: a whole number of 1 or more"),
        (["--name=My_Run", *job()[1:]], "--name=My_Run: Kubernetes takes lower case"),
        ([*job(), "--workdir=runs/x"], "would be inside of a pod"),
    ],
)
def test_mistakes_are_named(cloud, args, said):
    code, out, err = cloud.run("gke.sh", *args)
    assert (code, out) == (1, "") and err.startswith("error: ") and said in err


def test_variables_of_the_environment(cloud):
    *_, pod = manifest(cloud, '--env=A_1=b c="d"', "--env=EMPTY=")
    (container,) = pod["containers"]
    found = {v["name"]: v["value"] for v in container["env"]}
    assert found["A_1"] == 'b c="d"' and found["EMPTY"] == ""
    assert float(found["LM_JAX_JOIN_SECONDS"]) > 300
    for wrong in ("A", "=b", "1A=b", "A-B=c"):
        code, _, err = cloud.run("gke.sh", "--dry-run", *job(f"--env={wrong}"))
        assert code == 1 and f"--env={wrong}: give --env=NAME=VALUE" in err
