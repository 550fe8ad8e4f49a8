"""cluster/kuberay.yaml: the fields that KubeRay documents, what Ray's autoscaler makes of it, and
that a misspelt field is refused."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from bgray.cluster_check import check

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "cluster" / "kuberay.yaml"

GROUPS = {  # as Ray's autoscaler must see them: (CPU, GPU, priority)
    "cpu_worker": (15, None, 10),
    "cpu_worker_ondemand": (15, None, 1),
    "gpu_worker": (7, 1, 10),
    "gpu_worker_ondemand": (7, 1, 1),
}


MARKERS = {name: {name: 1} for name in GROUPS}
MARKERS["cpu_worker_ondemand"]["cpu_worker"] = 1  # data tasks ask for that one


def changed(tmp_path, old, new, *more):
    text = FILE.read_text()
    for before, after in ((old, new), *more):
        assert before in text, f"the file no longer has {before!r}"
        text = text.replace(before, after, 1)
    path = tmp_path / "kuberay.yaml"
    path.write_text(text)
    return path


def errors(path):
    return [p for p in check(str(path)) if p.error]


def line_of(path, text):
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


MINE = [
    ("s3://YOUR-BUCKET/results", "s3://mine/results"),
    ("s3://YOUR-BUCKET/data", "s3://mine/data"),
    ("image: &image rayproject/ray:", "image: &image registry.example/me/bgray:"),
]


def test_the_shipped_file_lacks_only_a_bucket_and_an_image_with_bgray_in_it(tmp_path):
    problems = check(str(FILE))
    assert [p.error for p in problems] == [True, True]
    assert "YOUR-BUCKET" in problems[0].text
    assert "no bgray in it" in problems[1].text
    assert problems[1].line == line_of(FILE, "image: &image")
    assert check(str(changed(tmp_path, *MINE[0], *MINE[1:]))) == []


def test_the_driver_is_told_of_the_groups_as_the_autoscaler_sees_them():
    spec = yaml.safe_load(FILE.read_text())["spec"]["rayClusterSpec"]
    env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    told = json.loads({e["name"]: e["value"] for e in env}["BGRAY_NODE_TYPES"])
    most = {group["groupName"]: group["maxReplicas"] for group in spec["workerGroupSpecs"]}
    assert {name: kind["max_workers"] for name, kind in told.items()} == most
    for name, (cpus, gpus, _) in GROUPS.items():
        offered = {"CPU": cpus, "GPU": gpus, **MARKERS[name]}
        assert told[name]["resources"] == {k: v for k, v in offered.items() if v}


def test_a_head_that_is_told_nothing_is_refused_with_what_to_write(tmp_path):
    text = FILE.read_text()
    start, end = text.index("                - name: BGRAY_NODE"), text.index("    # Spot pods")
    [problem] = errors(changed(tmp_path, text[start:end], "", *MINE))
    assert "BGRAY_NODE_TYPES is missing" in problem.text
    told = yaml.safe_load(text[start:end])[0]["value"]
    assert json.loads(problem.text.split("'")[1]) == json.loads(told)


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        ("rayproject/ray:2.60.0", True, "no bgray in it"),
        ("docker.io/rayproject/ray:2.61.0", True, "must name it"),
        ("me/bgray:2.6.0", False, "does not say"),
        (f"me/bgray@sha256:{'0a' * 32}", None, ""),
        ("me/bgray:ray-2.60.0-7", None, ""),
    ],
)
def test_only_rays_own_images_must_name_ray_in_their_tag(tmp_path, image, error, said):
    new = ("rayproject/ray:2.60.0-py312-gpu\n              resources", f"{image}\n  #\n   "
           "           resources")  # fmt: skip
    found = check(str(changed(tmp_path, *MINE[0], MINE[1], new)))
    assert {p.error for p in found} == ({error} if error is not None else set())
    assert not said or any(said in p.text for p in found)


def test_rays_own_autoscaler_reads_from_it_what_each_group_offers():
    from ray.autoscaler._private.kuberay import autoscaling_config as kuberay

    spec = yaml.safe_load(FILE.read_text())["spec"]["rayClusterSpec"]
    types = kuberay._generate_available_node_types_from_ray_cr_spec(spec)
    head = types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    assert set(types) == set(GROUPS)
    for name, (cpus, gpus, priority) in GROUPS.items():
        resources = dict(types[name]["resources"])
        resources.pop("memory")
        assert resources.pop("CPU") == cpus
        assert resources.pop("GPU", None) == gpus
        assert resources == MARKERS[name]
        assert types[name]["priority"] == priority
        assert types[name]["min_workers"] == 0


def test_the_marker_survives_the_shell_that_starts_ray():
    """KubeRay puts the value behind --resources= as it stands, in a command for bash."""
    for group in yaml.safe_load(FILE.read_text())["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        value = group["rayStartParams"]["resources"]
        done = subprocess.run(
            ["bash", "-c", f"printf %s {value}"], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == MARKERS[group["groupName"]]


def test_secrets_come_by_reference_only():
    spec = yaml.safe_load(FILE.read_text())["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "bgray-token"}
    names = set()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            names |= {e["name"] for e in container.get("env", ()) if "value" in e}
    assert names == {"RAY_JOB_STOP_WAIT_TIME_S", "AWS_DEFAULT_REGION", "BGRAY_NODE_TYPES"}


MISTAKES = [
    # (old, new, text on the line that is named, what is said)
    ("entrypoint:", "entripoint:", "entripoint", "did you mean 'entrypoint'"),
    ("ttlSecondsAfterFinished", "ttlSecondAfterFinished", "ttlSecondA", "did you mean"),
    ("workerGroupSpecs:", "workersGroupSpecs:", "workersGroup", "did you mean 'workerGroupSpecs'"),
    ("minReplicas: 0", "minReplica: 0", "minReplica:", "did you mean 'minReplicas'"),
    ("serviceAccountName: bgray", "serviceAcountName: bgray", "serviceAcount", "did you mean"),
    ("runAsNonRoot: true", "runAsNonroot: true", "runAsNonroot", "did you mean 'runAsNonRoot'"),
    ("containerPort: 6379", "port: 6379", "port: 6379", "unknown field"),
    ("operator: Equal", "operator: Equals", "Equals", "there is Equal"),
    ("kind: RayJob", "kind: RayJobs", "kind:", "there is RayJob"),
    ("submissionMode: K8sJobMode", "submissionMode: JobMode", "JobMode", "there is HTTPMode"),
    ("backoffLimit: 2", 'backoffLimit: "2"', "backoffLimit", "expected a whole number"),
    ('num-gpus: "0"', "num-gpus: 0", "num-gpus", "must be text"),
    ('num-gpus: "0"', 'num-gpu: "0"', "num-gpu:", "option of `ray start`"),
    ('num-cpus: "0"', 'num-cpus: "4"', "num-cpus", "trials run on the head"),
    ("      mode: token\n", "      mode: disabled\n", "authOptions:", "any pod runs code"),
    ('rayVersion: "2.60.0"', 'rayVersion: "2.9.3"', "rayVersion", "make them equal"),
    ("ray:2.60.0-py312-gpu\n              resources", "ray:latest-gpu\n              resources",
     "image: &image", "not pinned to Ray 2.60.0"),
    ("serviceType: ClusterIP", "serviceType: LoadBalancer", "serviceType", "port-forward"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "spec:", "paid"),
    ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "rayClusterSpec:",
     "no worker ever starts"),
    (r'{\"cpu_worker\": 1}', r'{\"cpu_workers\": 1}', r"cpu_workers\"", "write resources"),
    (r"""'"{\"cpu_worker\": 1}"'""", """'{"cpu_worker": 1}'""", """'{"cpu_worker""", "resources:"),
    ("groupName: gpu_worker_ondemand", "groupName: spare", "groupName: gpu_worker",
     "add gpu_worker_ondemand"),
    ("priority: 1\n", "priority: 10  # wrong\n", "# wrong", "must be below"),
    ("*on_demand\n", "*spot  # wrong\n", "# wrong", "is spot itself"),
    (r'{\"cpu_worker\": 1, \"cpu_w', r'{\"cpu_w', r'"{\"cpu_worker_on', "write resources"),
    (r'{\"gpu_worker_ondemand\": 1}', r'{\"gpu_worker\": 1, \"gpu_worker_ondemand\": 1}',
     r'1, \"gpu_worker_on', "what asks for gpu_worker would land here"),
    ("maxReplicas: 8", "maxReplicas: 9", "value: >-", '"max_workers": 9}, this {'),
    ('"CPU": 7, "GPU": 1, "gpu_worker": 1', '"CPU": 7, "gpu_worker": 1', "value: >-",
     "for gpu_worker the groups have"),
    ('"gpu_worker": {"resources"', '"gpu_workers": {"resources"', "value: >-", "for gpu_workers"),
    ('"max_workers": 4}}', '"max_workers": 4}', "value: >-", "no JSON"),
    ("allowPrivilegeEscalation: false", "privileged: true", "privileged", "owns the machine"),
    ("          serviceAccountName: bgray", "          hostNetwork: true", "hostNetwork", "share"),
    ('value: us-west-2}', 'value: ' + "aB3" * 14 + "}", "aB3aB3", "a secret"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "marked", "said"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_each_mistake_is_refused_on_its_line(tmp_path, old, new, marked, said):
    path = changed(tmp_path, old, new)
    lines = [i for i, text in enumerate(path.read_text().splitlines(), 1) if marked in text]
    found = errors(path)
    assert [p for p in found if said in p.text and p.line in lines], "\n".join(map(str, found))
