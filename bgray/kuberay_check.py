"""Lint of a RayJob for KubeRay: its documented fields, and what a cluster of bgray's must have."""

import json
import re
from typing import Any

from bgray.aws_check import FALLBACK, also_of
from bgray.cluster_yaml import Sheet, Where
from bgray.problems import unknown

# Field names and types: ray.io/v1 as in KubeRay 1.7's API reference, pods as in Kubernetes 1.37's.
# A mapping is closed, so that another name in it is a mistake; ANY is not looked into; [x] is a
# list of x; a set is a choice.
ANY, TEXT, NUMBER, BOOL, TEXTS = "anything", "text", "a whole number", "true or false", "texts"
RESOURCES = {"requests": ANY, "limits": ANY, "claims": ANY}
CAPABILITIES = {"add": [TEXT], "drop": [TEXT]}
SECCOMP = {"type": {"RuntimeDefault", "Localhost", "Unconfined"}, "localhostProfile": TEXT}
IDENTITY = {
    "runAsUser": NUMBER, "runAsGroup": NUMBER, "runAsNonRoot": BOOL, "seccompProfile": SECCOMP,
    "seLinuxOptions": ANY, "windowsOptions": ANY, "appArmorProfile": ANY,
}  # fmt: skip
SECURITY = IDENTITY | {
    "allowPrivilegeEscalation": BOOL, "privileged": BOOL, "readOnlyRootFilesystem": BOOL,
    "procMount": TEXT, "capabilities": CAPABILITIES,
}  # fmt: skip
POD_SECURITY = IDENTITY | {
    "fsGroup": NUMBER, "fsGroupChangePolicy": TEXT, "supplementalGroups": [NUMBER],
    "supplementalGroupsPolicy": TEXT, "sysctls": ANY, "seLinuxChangePolicy": TEXT,
}  # fmt: skip
KEY_OF = {"name": TEXT, "key": TEXT, "optional": BOOL}
ENV = {
    "name": TEXT,
    "value": TEXT,
    "valueFrom": {
        "secretKeyRef": KEY_OF, "configMapKeyRef": KEY_OF, "fieldRef": ANY,
        "resourceFieldRef": ANY, "fileKeyRef": ANY,
    },
}  # fmt: skip
MOUNT = {
    "name": TEXT, "mountPath": TEXT, "readOnly": BOOL, "subPath": TEXT, "subPathExpr": TEXT,
    "mountPropagation": TEXT, "recursiveReadOnly": TEXT, "bindMountOptions": ANY,
}  # fmt: skip
PORT = {
    "name": TEXT, "containerPort": NUMBER, "protocol": {"TCP", "UDP", "SCTP"}, "hostIP": TEXT,
    "hostPort": NUMBER,
}  # fmt: skip
CONTAINER = {
    "name": TEXT, "image": TEXT, "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "command": [TEXT], "args": [TEXT], "workingDir": TEXT, "ports": [PORT], "env": [ENV],
    "envFrom": ANY, "resources": RESOURCES, "resizePolicy": ANY, "restartPolicy": TEXT,
    "restartPolicyRules": ANY, "volumeMounts": [MOUNT], "volumeDevices": ANY, "lifecycle": ANY,
    "livenessProbe": ANY, "readinessProbe": ANY, "startupProbe": ANY, "securityContext": SECURITY,
    "stdin": BOOL, "stdinOnce": BOOL, "tty": BOOL, "terminationMessagePath": TEXT,
    "terminationMessagePolicy": TEXT,
}  # fmt: skip
TOLERATION = {
    "key": TEXT, "operator": {"Exists", "Equal", "Lt", "Gt"}, "value": TEXT,
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"}, "tolerationSeconds": NUMBER,
}  # fmt: skip
POD = {
    "containers": [CONTAINER], "initContainers": [CONTAINER], "ephemeralContainers": ANY,
    "volumes": ANY, "nodeSelector": TEXTS, "nodeName": TEXT, "affinity": ANY,
    "tolerations": [TOLERATION], "topologySpreadConstraints": ANY, "schedulerName": TEXT,
    "schedulingGates": ANY, "priority": NUMBER, "priorityClassName": TEXT,
    "preemptionPolicy": TEXT, "runtimeClassName": TEXT, "overhead": ANY, "os": ANY,
    "serviceAccountName": TEXT, "serviceAccount": TEXT, "automountServiceAccountToken": BOOL,
    "securityContext": POD_SECURITY, "imagePullSecrets": [{"name": TEXT}], "hostNetwork": BOOL,
    "hostPID": BOOL, "hostIPC": BOOL, "hostUsers": BOOL, "hostAliases": ANY, "hostname": TEXT,
    "hostnameOverride": TEXT, "subdomain": TEXT, "setHostnameAsFQDN": BOOL, "dnsPolicy": TEXT,
    "dnsConfig": ANY, "enableServiceLinks": BOOL, "shareProcessNamespace": BOOL,
    "restartPolicy": {"Always", "OnFailure", "Never"}, "terminationGracePeriodSeconds": NUMBER,
    "activeDeadlineSeconds": NUMBER, "readinessGates": ANY, "resourceClaims": ANY,
    "resources": RESOURCES, "evictionResponders": ANY, "schedulingGroup": ANY,
}  # fmt: skip
METADATA = {
    "name": TEXT, "generateName": TEXT, "namespace": TEXT, "labels": TEXTS, "annotations": TEXTS,
    "finalizers": [TEXT], "ownerReferences": ANY,
}  # fmt: skip
TEMPLATE = {"metadata": METADATA, "spec": POD}
GROUP = {"resources": TEXTS, "labels": TEXTS, "rayStartParams": TEXTS, "template": TEMPLATE}
HEAD = GROUP | {
    "headService": ANY, "enableIngress": BOOL,
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"},
}  # fmt: skip
WORKER = GROUP | {
    "groupName": TEXT, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER,
    "numOfHosts": NUMBER, "idleTimeoutSeconds": NUMBER, "priority": NUMBER, "suspend": BOOL,
    "scaleStrategy": {"workersToDelete": [TEXT]},
}  # fmt: skip
CLUSTER = {
    "rayVersion": TEXT, "headGroupSpec": HEAD, "workerGroupSpecs": [WORKER],
    "authOptions": {"mode": {"token", "disabled"}, "secretName": TEXT, "enableK8sTokenAuth": BOOL},
    "enableInTreeAutoscaling": BOOL,
    "autoscalerOptions": {
        "resources": RESOURCES, "image": TEXT, "imagePullPolicy": TEXT, "securityContext": SECURITY,
        "idleTimeoutSeconds": NUMBER, "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "version": {"v1", "v2"}, "env": [ENV], "envFrom": ANY, "volumeMounts": [MOUNT],
    },
    "headServiceAnnotations": TEXTS, "gcsFaultToleranceOptions": ANY, "historyServerOptions": ANY,
    "networkPolicy": ANY, "tlsOptions": {"enabled": BOOL}, "upgradeStrategy": {"type": TEXT},
    "suspend": BOOL, "managedBy": TEXT,
}  # fmt: skip
JOB = {
    "entrypoint": TEXT, "entrypointNumCpus": ANY, "entrypointNumGpus": ANY,
    "entrypointResources": TEXT, "runtimeEnvYAML": TEXT, "jobId": TEXT, "metadata": TEXTS,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "submitterPodTemplate": TEMPLATE, "submitterConfig": {"backoffLimit": NUMBER},
    "rayClusterSpec": CLUSTER, "clusterSelector": TEXTS, "shutdownAfterJobFinishes": BOOL,
    "ttlSecondsAfterFinished": NUMBER, "activeDeadlineSeconds": NUMBER, "backoffLimit": NUMBER,
    "preRunningDeadlineSeconds": NUMBER, "deletionStrategy": ANY, "managedBy": TEXT,
    "suspend": BOOL,
}  # fmt: skip
FILE = {"apiVersion": {"ray.io/v1"}, "kind": {"RayJob"}, "metadata": METADATA, "spec": JOB}

NEEDED: dict[Where, tuple[str, ...]] = {
    (): ("apiVersion", "kind", "metadata", "spec"),
    ("spec",): ("entrypoint", "rayClusterSpec"),
    ("spec", "rayClusterSpec"): ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    ("spec", "rayClusterSpec", "headGroupSpec"): ("rayStartParams", "template"),
}
NEEDED_BY_GROUP = ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template")

CLUSTER_AT = ("spec", "rayClusterSpec")
TYPES = "BGRAY_NODE_TYPES"
"""What the head is told of the groups: Ray itself tells a driver only of pods that have joined."""


def check_rayjob(sheet: Sheet, ray: str) -> None:
    """Adds what is wrong to `sheet.problems`. ray: the client's version, which pods must have."""
    _fits(sheet, (), sheet.data, FILE)
    for where, keys in NEEDED.items():
        if sheet.get(*where) is not None:
            for key in keys:
                if sheet.get(*where, key) is None:
                    sheet.error(where, f"'{key}' is missing")
    metadata = sheet.table("metadata")
    if metadata and not {"name", "generateName"} & set(metadata):
        sheet.error(("metadata",), "name or generateName is missing")
    if sheet.get("spec", "shutdownAfterJobFinishes") is not True:
        text = "write shutdownAfterJobFinishes: true, or the pods stay, paid, when the job is done"
        sheet.error(("spec",), text)
    for where, value in sheet.leaves():
        if "YOUR-BUCKET" in str(value):
            sheet.error(where, "YOUR-BUCKET is a placeholder: write your bucket")
    _cluster(sheet, ray)


def _fits(sheet: Sheet, where: Where, value: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            sheet.error(where, f"expected `key: value` lines, got {value!r}")
            return
        for key, item in value.items():
            if key in wanted:
                _fits(sheet, (*where, key), item, wanted[key])
            else:
                sheet.error((*where, str(key)), unknown(str(key), sorted(wanted), "field"))
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            sheet.error(where, f"expected a list, got {value!r}")
            return
        for i, item in enumerate(value):
            _fits(sheet, (*where, i), item, wanted[0])
    elif isinstance(wanted, set):
        if value not in wanted:
            sheet.error(where, f"got {value!r}; there is {', '.join(sorted(wanted))}")
    elif wanted == TEXTS:
        if not isinstance(value, dict):
            sheet.error(where, f"expected `key: value` lines, got {value!r}")
            return
        for key, item in value.items():
            if not isinstance(item, str):
                sheet.error((*where, str(key)), f'must be text: write "{item}", with the quotes')
    elif wanted != ANY:
        fits = {
            TEXT: isinstance(value, str),
            BOOL: isinstance(value, bool),
            NUMBER: isinstance(value, int) and not isinstance(value, bool),
        }
        if not fits[wanted]:
            sheet.error(where, f"expected {wanted}, got {value!r}")


def _cluster(sheet: Sheet, ray: str) -> None:
    cluster = sheet.table(*CLUSTER_AT)
    if not cluster:
        return
    auth = sheet.table(*CLUSTER_AT, "authOptions")
    if auth.get("mode") != "token":
        at = (*CLUSTER_AT, "authOptions") if auth else CLUSTER_AT
        sheet.error(at, "write authOptions: {mode: token}: without it any pod runs code here")
    if auth.get("enableK8sTokenAuth"):
        text = "KubeRay has this for a RayCluster only, not for a RayJob"
        sheet.error((*CLUSTER_AT, "authOptions", "enableK8sTokenAuth"), text)
    if ray and cluster.get("rayVersion") not in (None, ray):
        text = f"{cluster['rayVersion']}, but this machine has Ray {ray}; make them equal"
        sheet.error((*CLUSTER_AT, "rayVersion"), text)
    if cluster.get("enableInTreeAutoscaling") is not True:
        sheet.error(CLUSTER_AT, "write enableInTreeAutoscaling: true, or no worker ever starts")
    head = (*CLUSTER_AT, "headGroupSpec")
    if sheet.get(*head) is not None:
        _pods(sheet, head, ray)
        if sheet.get(*head, "serviceType") not in (None, "ClusterIP"):
            text = "write ClusterIP: another type shows the dashboard outside; use port-forward"
            sheet.error((*head, "serviceType"), text)
        if sheet.get(*head, "enableIngress"):
            sheet.error((*head, "enableIngress"), "shows the dashboard outside; use port-forward")
        if str(sheet.table(*head, "rayStartParams").get("num-cpus")) != "0":
            text = 'write num-cpus: "0", or trials run on the head and take it down'
            sheet.error((*head, "rayStartParams", "num-cpus"), text)
        if _is_spot(sheet, head):
            text = "the head must not be spot: when it goes, the cluster and what it runs go too"
            sheet.error((*head, "template", "spec", "nodeSelector"), text)
    groups = cluster.get("workerGroupSpecs")
    groups = groups if isinstance(groups, list) else []
    found = [g for g in groups if isinstance(g, dict)]
    names = [str(g.get("groupName")) for g in found]
    there = [(*CLUSTER_AT, "workerGroupSpecs", i) for i, g in enumerate(groups) if g in found]
    for where in there:
        _group(sheet, where, names, ray)
    _told(sheet, head, there)


def _told(sheet: Sheet, head: Where, groups: list[Where]) -> None:
    """BGRAY_NODE_TYPES on the head against the groups: by it a sweep knows what may still join."""
    at = (*head, "template", "spec", "containers", 0, "env")
    env = sheet.get(*at)
    names = [e.get("name") for e in (env if isinstance(env, list) else []) if isinstance(e, dict)]
    wanted = {str(sheet.get(*w, "groupName")): _as_told(sheet, w) for w in groups}
    if TYPES not in names:
        text = f"{TYPES} is missing in env, by which a sweep knows what may join. Write its value:"
        sheet.error(at, f"{text} '{json.dumps(wanted)}'")
        return
    at = (*at, names.index(TYPES), "value")
    try:
        told = json.loads(str(sheet.get(*at)))
    except ValueError as error:
        sheet.error(at, f"no JSON: {error}")
        return
    told = told if isinstance(told, dict) else {}
    for name in sorted({*told, *wanted}):
        if told.get(name) != wanted.get(name) and wanted.get(name, {}) is not None:
            text = f"for {name} the groups have {json.dumps(wanted.get(name))}"
            sheet.error(at, f"{text}, this {json.dumps(told.get(name))}; make them equal")


def _as_told(sheet: Sheet, where: Where) -> dict[str, Any] | None:
    """A worker group as a node type of `ray up`'s, read as Ray's autoscaler reads it:
    {"resources": ..., "max_workers": ...}; None where it could not."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    read = autoscaling_config._get_ray_resources_from_group_spec
    try:
        found = read(sheet.table(*where), is_head=False)
    except Exception:  # whatever a half-written group makes of Ray; what is wrong is said elsewhere
        return None
    resources = {k: v for k, v in found.items() if v and k != "memory"}
    return {"resources": resources, "max_workers": sheet.get(*where, "maxReplicas")}


def _pods(sheet: Sheet, where: Where, ray: str) -> None:
    """Pods of one group: image, rights."""
    spec = (*where, "template", "spec")
    pod = sheet.table(*spec)
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            sheet.error((*spec, key), "the pod would share the machine's; leave it out")
    containers = pod.get("containers")
    containers = containers if isinstance(containers, list) else []
    if not containers:
        sheet.error(spec if pod else where, "no container")
    for i, container in enumerate(containers):
        if not isinstance(container, dict):
            continue
        at = (*spec, "containers", i)
        image = str(container.get("image", ""))
        if not image:
            sheet.error(at, "'image' is missing")
        elif of_rayproject(image):
            text = f"{image} has no bgray in it: build yours from it, see the comment there"
            lines = enumerate(sheet.lines, 1)  # said once, wherever an anchor takes it
            line = next((n for n, t in lines if "image:" in t and image in t), None)
            sheet.error((), text, line=line)
        check_image(sheet, (*at, "image"), image, ray)
        own = sheet.table(*at, "securityContext")
        both = sheet.table(*spec, "securityContext") | own
        if both.get("runAsNonRoot") is not True:
            sheet.error(at, "write securityContext: {runAsNonRoot: true}")
        if own.get("privileged"):
            text = "such a pod owns the machine; leave it out"
            sheet.error((*at, "securityContext", "privileged"), text)
        if own.get("allowPrivilegeEscalation") is not False:
            sheet.error(at, "write securityContext: {allowPrivilegeEscalation: false}")
    options = _ray_start_options()
    for key in sheet.table(*where, "rayStartParams"):
        if key not in options:
            text = unknown(str(key), options, "option of `ray start`")
            sheet.error((*where, "rayStartParams", key), text)


def of_rayproject(image: str) -> bool:
    """One of Ray's own images, which name their version in the tag."""
    return re.match(r"(docker\.io/)?rayproject/ray(-[\w-]+)?([:@]|$)", image) is not None


def check_image(sheet: Sheet, where: Where, image: str, ray: str) -> None:
    """Whether the image has this machine's Ray, as far as its name tells: a digest is as exact as
    it gets, and a tag of one's own need not say."""
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if not ray or digest or re.match(rf"(?:.*[^\d.])?{re.escape(ray)}(?![\d.])", tag):
        return
    if of_rayproject(image):
        sheet.error(where, f"{image} is not pinned to Ray {ray} by its tag, which must name it")
    elif image:
        text = f"{image}: its tag does not say that it has Ray {ray}, which this machine has"
        sheet.warn(where, text)


def _ray_start_options() -> list[str]:
    from ray.scripts.scripts import start

    return sorted(o.lstrip("-") for p in start.params for o in p.opts if o.startswith("--"))


def _is_spot(sheet: Sheet, where: Where) -> bool:
    spec = (*where, "template", "spec")
    chosen = {k: sheet.get(*spec, k) for k in ("nodeSelector", "affinity")}
    return "spot" in json.dumps(chosen, default=str).lower()


def _gpus(sheet: Sheet, where: Where) -> Any:
    limits = sheet.table(*where, "template", "spec", "containers", 0, "resources", "limits")
    return next((str(v) for k, v in limits.items() if str(k).endswith("gpu")), "0")


def _offered(sheet: Sheet, where: Where) -> dict[str, Any] | None:
    """A group's own resources, read as Ray's autoscaler reads them; None when it could not."""
    if sheet.table(*where, "resources"):
        return dict(sheet.table(*where, "resources"))
    text = sheet.table(*where, "rayStartParams").get("resources", '"{}"')
    try:
        offered = json.loads(str(text)[1:-1].replace("\\", ""))
    except ValueError:
        return None
    return offered if isinstance(offered, dict) else None


def _group(sheet: Sheet, where: Where, names: list[Any], ray: str) -> None:
    for key in NEEDED_BY_GROUP:
        if sheet.get(*where, key) is None:
            sheet.error(where, f"'{key}' is missing")
    _pods(sheet, where, ray)
    name = sheet.get(*where, "groupName")
    offered = _offered(sheet, where)
    wanted = {**also_of(str(name), names, _gpus(sheet, where) != "0"), str(name): 1}
    pattern = ", ".join(f'\\"{key}\\": 1' for key in wanted)
    if offered is None or any(str(offered.get(key)) != "1" for key in wanted):
        at = (*where, "rayStartParams", "resources")
        text = f"""write resources: '"{{{pattern}}}"'"""
        sheet.error(at, f"{text}; by it pods of this group are asked for")
    for other in names:
        if offered and other not in wanted and other in offered:
            text = f"has the resource of another group: what asks for {other} would land here"
            sheet.error((*where, "rayStartParams", "resources"), text)
    if names.count(name) > 1:
        sheet.error((*where, "groupName"), f"{name} is written twice")
    if low := sheet.get(*where, "minReplicas"):
        text = f"{low} of these are paid as long as the job lives, busy or not"
        sheet.warn((*where, "minReplicas"), text)
    if not _is_spot(sheet, where):
        return
    if str(name).endswith(FALLBACK):
        text = "is the fallback for when spot has no capacity, and is spot itself"
        sheet.error((*where, "template", "spec", "nodeSelector"), text)
        return
    other = f"{name}{FALLBACK}"
    if other not in names:
        text = f"a spot group without fallback: add {other}, not on spot nodes, with its resource"
        (sheet.warn if _gpus(sheet, where) == "0" else sheet.error)(where, text)
        return
    there = (*where[:-1], names.index(other))
    if (own := _gpus(sheet, where)) != (its := _gpus(sheet, there)):
        sheet.error(there, f"{its} GPUs, but {name} has {own}")
    first, second = sheet.get(*where, "priority") or 0, sheet.get(*there, "priority") or 0
    if isinstance(first, int) and isinstance(second, int) and first <= second:
        text = f"priority {second} must be below that of {name}, {first}, or Ray starts both"
        sheet.error((*there, "priority"), text)
