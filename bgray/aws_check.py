"""Lint of a cluster file for AWS: what each node type asks EC2 for, what it costs, who reaches
it."""

import difflib
import functools
import re
from typing import Any

from bgray.cluster_yaml import Sheet, Where
from bgray.problems import unknown

PLACEHOLDER = "ami-0123456789abcdef0"
FALLBACK = "_ondemand"
"""A type of that name is started when spot has no capacity for the type without it."""

RAYS_OWN = {"SubnetIds"}  # Ray makes a SubnetId of them
RAY_SETS = {"MinCount", "MaxCount"}


def check_aws(sheet: Sheet) -> None:
    """Adds what is wrong to `sheet.problems`. Asks nothing of AWS: EC2's words come from
    botocore."""
    region, zones = sheet.get("provider", "region"), sheet.get("provider", "availability_zone")
    if not isinstance(region, str):
        sheet.error(("provider",), "region is missing, e.g. us-west-2")
    if isinstance(zones, str):
        names = [z.strip() for z in zones.split(",")]
        where = ("provider", "availability_zone")
        for zone in names:
            if isinstance(region, str) and not re.fullmatch(rf"{re.escape(region)}[a-z]", zone):
                sheet.error(where, f"{zone!r} is no zone of {region}")
        if len(names) == 1:
            sheet.warn(where, "one zone: when it has no capacity, no other is tried")
    else:
        sheet.warn(("provider",), "no availability_zone; name several, for capacity differs")
    if sheet.get("provider", "cache_stopped_nodes") is not False:
        text = "write cache_stopped_nodes: false; nodes are stopped else, and their disks paid"
        sheet.error(("provider",), text)

    wanted = _run_instances()
    types = sheet.table("available_node_types")
    head = sheet.get("head_node_type")
    for name, node in types.items():
        if isinstance(node, dict):
            where: Where = ("available_node_types", name)
            config = sheet.table(*where, "node_config")
            _as_ec2_has_it(sheet, (*where, "node_config"), config, wanted, top=True)
            _machine(sheet, where, config, is_head=name == head)
            if name == head:
                _head(sheet, where, node)
            else:
                _worker(sheet, name, types)
    if "max_workers" not in sheet.data:
        sheet.warn((), "max_workers is missing: Ray's default is 2 workers in all")
    _who_reaches_it(sheet)
    spot = [n for n in types if _is_spot(sheet, n)]
    watched = any("bgray.spot" in str(c) for c in sheet.get("worker_start_ray_commands") or ())
    if spot and not watched:
        text = "start `python -m bgray.spot` too: without it a spot node goes without a checkpoint"
        sheet.warn(("worker_start_ray_commands",), text)


@functools.cache
def _run_instances() -> Any:
    """botocore's model of that request, as of the version installed."""
    import botocore.session

    ec2 = botocore.session.get_session().get_service_model("ec2")
    return ec2.operation_model("RunInstances").input_shape


def _is_spot(sheet: Sheet, name: str) -> bool:
    options = sheet.table("available_node_types", name, "node_config", "InstanceMarketOptions")
    return options.get("MarketType") == "spot"


def _as_ec2_has_it(sheet: Sheet, where: Where, value: Any, shape: Any, top: bool = False) -> None:
    """Names, types and choices against botocore's model of RunInstances."""
    kind = shape.type_name
    if kind == "structure":
        if not isinstance(value, dict):
            sheet.error(where, f"expected `key: value` lines, got {value!r}")
            return
        known = set(shape.members)
        for key, item in value.items():
            if top and key in RAYS_OWN:
                continue
            if top and key in RAY_SETS:
                sheet.error((*where, key), "Ray sets this itself")
            elif key not in known:
                sheet.error((*where, key), unknown(str(key), sorted(known), "key of RunInstances"))
            else:
                _as_ec2_has_it(sheet, (*where, key), item, shape.members[key])
    elif kind == "list":
        if not isinstance(value, list):
            sheet.error(where, f"expected a list, got {value!r}")
            return
        for i, item in enumerate(value):
            _as_ec2_has_it(sheet, (*where, i), item, shape.member)
    elif kind == "string":
        choices = getattr(shape, "enum", None)
        if not isinstance(value, str):
            sheet.error(where, f"expected text, got {value!r}")
        elif choices and value not in choices:
            near = difflib.get_close_matches(value, choices, 1, cutoff=0.6)
            few = f"; there is {', '.join(choices)}" if len(choices) < 10 else ""
            sheet.error(where, f"EC2 knows no {value!r}" + _maybe(near, few))
    elif kind == "boolean" and not isinstance(value, bool):
        sheet.error(where, f"expected true or false, got {value!r}")
    elif kind in ("integer", "long") and (isinstance(value, bool) or not isinstance(value, int)):
        sheet.error(where, f"expected a whole number, got {value!r}")


def _maybe(near: list[str], otherwise: str) -> str:
    return f", did you mean {near[0]!r}?" if near else otherwise


def _machine(sheet: Sheet, where: Where, config: dict[str, Any], is_head: bool) -> None:
    """What every instance must have, head or worker."""
    at = (*where, "node_config")
    if "InstanceType" not in config:
        sheet.error(at, "InstanceType is missing")
    image = config.get("ImageId")
    if image is None:
        text = (
            "ImageId is missing: Ray's own default is years old and has no driver for today's GPUs"
        )
        sheet.error(at, text)
    elif not re.fullmatch(r"ami-([0-9a-f]{8}|[0-9a-f]{17})", str(image)):
        text = f"{image!r} is no image's id (ami- and 17 hexadecimal digits); pin one"
        sheet.error((*at, "ImageId"), text)
    elif image == PLACEHOLDER:
        line = next((n for n, t in enumerate(sheet.lines, 1) if PLACEHOLDER in t), None)
        text = f"{image} is a placeholder: write your region's image, see the comment there"
        sheet.error((), text, line=line)
    profile = config.get("IamInstanceProfile")
    if not isinstance(profile, dict) or not ({"Name", "Arn"} & set(profile)):
        text = "IamInstanceProfile is missing: "
        text += (
            "Ray would make a role that may do everything with EC2 and S3"
            if is_head
            else "the node could not read or write S3"
        )
        sheet.error(at, f"{text}; see cluster/iam")
    metadata = config.get("MetadataOptions")
    if not isinstance(metadata, dict) or metadata.get("HttpTokens") != "required":
        at_it = (*at, "MetadataOptions") if metadata is not None else at
        text = "write MetadataOptions: {HttpTokens: required}: with IMDSv1 a request tricked out of"
        sheet.error(at_it, f"{text} any process returns the role's keys")
    disks = config.get("BlockDeviceMappings")
    if not isinstance(disks, list) or not disks:
        text = "BlockDeviceMappings is missing: the image's own disk is small and may be in clear"
        sheet.error(at, text)
        return
    for i, disk in enumerate(disks):
        ebs = disk.get("Ebs") if isinstance(disk, dict) else None
        if not isinstance(ebs, dict):
            continue
        here = (*at, "BlockDeviceMappings", i, "Ebs")
        if ebs.get("Encrypted") is not True:
            sheet.error(here, "write Encrypted: true; the disk holds the token and your audio")
        if ebs.get("DeleteOnTermination") is not True:
            sheet.error(
                here, "write DeleteOnTermination: true, or each lost node leaves a paid disk"
            )


def _head(sheet: Sheet, where: Where, node: dict[str, Any]) -> None:
    if _is_spot(sheet, str(where[-1])):
        at = (*where, "node_config", "InstanceMarketOptions")
        text = "the head must not be spot: when it goes, the cluster and what it runs go with it"
        sheet.error(at, text)
    resources = sheet.table(*where, "resources")
    for key in ("CPU", "GPU"):
        if resources.get(key, 0 if key == "GPU" else None) != 0:
            text = f"write resources: {{CPU: 0, GPU: 0}} (got {key}: {resources.get(key)}), or"
            sheet.error((*where, "resources"), f"{text} trials run on the head and take it down")
    if node.get("max_workers", 0) or node.get("min_workers", 0):
        sheet.error(where, "min_workers and max_workers of the head's type make workers of it")


def _worker(sheet: Sheet, name: str, types: dict[str, Any]) -> None:
    where: Where = ("available_node_types", name)
    node = sheet.table(*where)
    resources = sheet.table(*where, "resources")
    at = (*where, "resources")
    if resources.get(name) != 1:
        text = (
            f"write {name}: 1 (got {resources.get(name)}); by it nodes of this type are asked for"
        )
        sheet.error(at, text)
    wanted = {name: 1, **also_of(name, list(types), bool(resources.get("GPU")))}
    for other in types:
        if other in resources and other not in wanted:
            text = f"has the resource of another type: what asks for {other} would land here"
            sheet.error((*at, other), text)
        elif other != name and other in wanted and resources.get(other) != 1:
            text = f"write {other}: 1 (got {resources.get(other)}) too: it stands in for {other},"
            sheet.error(at, f"{text} for which data tasks ask by that name")
    low, high = node.get("min_workers", 0), node.get("max_workers", 0)
    if isinstance(low, int) and low > 0:
        text = f"{low} of these are paid from `ray up` to `ray down`, busy or not"
        sheet.warn((*where, "min_workers"), text)
    if "max_workers" not in node:
        sheet.error(where, "max_workers is missing: Ray then takes that of all types together")
    elif isinstance(low, int) and isinstance(high, int) and high < low:
        sheet.error((*where, "max_workers"), f"{high} is less than min_workers, {low}")
    total = sheet.get("max_workers")
    if isinstance(high, int) and isinstance(total, int) and high > total:
        sheet.warn((*where, "max_workers"), f"{high}, but the file's max_workers is {total}")
    if name.endswith(FALLBACK):
        if _is_spot(sheet, name):
            text = "is the fallback for when spot has no capacity, and is spot itself"
            sheet.error((*where, "node_config", "InstanceMarketOptions"), text)
        if name.removesuffix(FALLBACK) not in types:
            text = f"is a fallback by its name, but there is no {name.removesuffix(FALLBACK)}"
            sheet.error(where, text)
    elif _is_spot(sheet, name):
        _fallback(sheet, name, types)


def also_of(name: str, names: list[str], has_gpus: bool) -> dict[str, int]:
    """Resources that a type offers besides the one of its own name. The fallback of a CPU type has
    that type's, because data tasks ask for it; trials ask for GPUs only, so theirs has not."""
    other = name.removesuffix(FALLBACK)
    return {other: 1} if other != name and other in names and not has_gpus else {}


def _fallback(sheet: Sheet, name: str, types: dict[str, Any]) -> None:
    """A spot type needs one on demand: Ray asks for spot for ever, whatever the priorities."""
    other = name + FALLBACK
    where: Where = ("available_node_types", name)
    gpus = sheet.get(*where, "resources", "GPU")
    if other not in types:
        marks = "".join(f", {m}: 1" for m in (other, *also_of(other, [name], bool(gpus))))
        text = f"a spot type without fallback: add {other}, on demand, with {marks[2:]}"
        (sheet.error if gpus else sheet.warn)(where, text)
        return
    there: Where = ("available_node_types", other)
    its = sheet.get(*there, "resources", "GPU")
    if gpus != its:
        text = f"GPU: {its}, but {name} has {gpus}: a trial that fits one would not fit the other"
        sheet.error((*there, "resources"), text)
    first, second = sheet.get(*where, "priority") or 0, sheet.get(*there, "priority") or 0
    if isinstance(first, int) and isinstance(second, int) and first <= second:
        at = there if sheet.get(*there, "priority") is None else (*there, "priority")
        text = (
            f"priority {second} must be below that of {name}, {first}: with equal ones Ray starts"
        )
        sheet.error(at, f"{text} both at once, and with higher ones this type always")
    if sheet.get(*where, "max_workers") and sheet.get(*there, "max_workers") == 0:
        text = f"0, so there is no fallback for {name}"
        sheet.warn((*there, "max_workers"), text)


def _who_reaches_it(sheet: Sheet) -> None:
    for where, value in sheet.leaves():
        if not isinstance(value, str) or not re.search(r"(^|[\s,])(0\.0\.0\.0|::)/0", value):
            continue
        rule: dict[str, Any] = {}
        for end in range(len(where), 0, -1):  # the rule that this range stands in
            table = sheet.table(*where[:end])
            if "FromPort" in table or "IpProtocol" in table:
                rule = table
                break
        line = sheet.lines[sheet.line(where) - 1]
        if rule.get("FromPort") == 22 and rule.get("ToPort") == 22 and "#" in line:
            continue
        text = (
            f"{value} is the whole Internet; name your own address (or, for port 22 alone, say why"
        )
        sheet.error(where, f"{text} in a comment on this line)")
