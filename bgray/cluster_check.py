"""Lint of a cluster file before money is spent: Ray's own schema, then what a cluster of bgray's
must have; every problem with its line, none asked of a cloud."""

import contextlib
import copy
import io
import json
import logging
import re
import stat
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bgray.cluster_yaml import Problem, Sheet, Where, refuse_secrets
from bgray.problems import ConfigError, unknown

DOCUMENTATION = ("192.0.2.", "198.51.100.", "203.0.113.")
"""Networks that belong to nobody (RFC 5737): what the shipped file has for addresses."""

TOKEN = "~/.ray/auth_token"
MAKE_TOKEN = "make one with `ray get-auth-token --generate && chmod 600 ~/.ray/auth_token`"
PROVIDER_KEYS = {
    "aws": {
        "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips",
        "security_group", "key_pair", "cloudwatch", "disable_node_updaters",
        "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check",
        "worker_rpc_drain",
    },
    "local": {"type", "head_ip", "external_head_ip", "worker_ips"},
}  # fmt: skip


def check(source: str) -> list[Problem]:
    """All that is wrong with a cluster file, in the order of its lines.

    Ray's provider `aws` or `local`, or a RayJob of KubeRay's. Reads the files that it mounts, and
    paths as `ray up` does: from the current folder. ConfigError when there is no such file.
    """
    if not Path(source).is_file():
        raise ConfigError(source, [("", "no such file; give a cluster's YAML, as in cluster/")])
    sheet = Sheet(source)
    refuse_secrets(sheet)
    if sheet.data:
        if "kind" in sheet.data or "apiVersion" in sheet.data:
            from bgray.kuberay_check import check_rayjob

            check_rayjob(sheet, ray_version())
        else:
            _check_launched(sheet)
    return sheet.found()


def report(source: str) -> int:
    """Print what `check` finds; the exit code: 2 when something must be mended first, else 0."""
    problems = check(source)
    errors = sum(p.error for p in problems)
    warnings = len(problems) - errors
    print(f"{source}:" if problems else f"{source}: nothing to mend")
    for problem in problems:
        print(f"  {problem}")
    if problems:
        print(f"{errors} to mend, {warnings} warning{'' if warnings == 1 else 's'}")
    sys.stdout.flush()
    return 2 if errors else 0


def ray_version() -> str:
    """The version of this machine's Ray; "" without one."""
    try:
        return version("ray")
    except PackageNotFoundError:
        return ""


def _check_launched(sheet: Sheet) -> None:
    """A file for `ray up`."""
    kind = sheet.get("provider", "type")
    if kind not in PROVIDER_KEYS:
        where: Where = ("provider", "type") if "provider" in sheet.data else ()
        what = "missing" if kind is None else f"got {kind!r}"
        sheet.error(where, f"{what}; known here are provider: {{type: aws}} and {{type: local}}")
        return
    _ray_schema(sheet)
    for key in sheet.table("provider"):
        if key == "aws_credentials":
            sheet.error(("provider", key), "no keys in a file: the head's are its role's")
        elif key not in PROVIDER_KEYS[kind]:
            sheet.error(("provider", key), unknown(key, sorted(PROVIDER_KEYS[kind]), "key"))
    _mounts(sheet)
    _token(sheet)
    _start_commands(sheet, kind)
    _ray_pinned(sheet)
    if kind == "aws":
        from bgray.aws_check import check_aws

        check_aws(sheet)
    else:
        _local(sheet)


# --- Ray's own


def _ray_schema(sheet: Sheet) -> None:
    """Ray's schema and its further rules, each with the line."""
    import ray.autoscaler
    from jsonschema.validators import validator_for
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()  # Ray prints what is wrong, in colours, and exits
    logging.disable(logging.WARNING)  # what it fills in
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared = prepare_config(copy.deepcopy(sheet.data))
    except (Exception, SystemExit) as error:  # whatever a half-written file makes of Ray
        words = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip().splitlines()
        sheet.error((), f"Ray refuses it: {words[-1] if words else repr(error)}")
        return
    finally:
        logging.disable(logging.NOTSET)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found: list[Any] = list(validator_for(schema)(schema).iter_errors(prepared))
    for error in found:
        where: Where = tuple(error.absolute_path)
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            known = list(error.schema.get("properties", {}))
            for key in error.instance:
                if key not in known:
                    sheet.error((*where, key), unknown(str(key), known, "key"))
        elif error.validator == "required":
            for key in error.validator_value:
                if key not in error.instance:
                    sheet.error(where, f"'{key}' is missing (Ray's schema)")
        else:
            sheet.error(where, f"{error.message} (Ray's schema)")
    if not found:
        try:
            validate_config(prepared)
        except (ValueError, RuntimeError) as error:
            key = next((k for k in ("head_node_type", "max_workers") if k in str(error)), "")
            sheet.error((key,) if key else (), f"{error} (Ray)")


# --- for every file that `ray up` takes


def _mounts(sheet: Sheet) -> None:
    for remote, local in sheet.table("file_mounts").items():
        where = ("file_mounts", remote)
        if not isinstance(local, str):
            sheet.error(where, f"expected a path on this machine, got {local!r}")
        elif not Path(local).expanduser().exists() and not remote.endswith("/.ray/auth_token"):
            hint = "; `ray up` reads it from the current folder"
            if (sheet.source.absolute().parent.parent / local).exists():
                hint += f": run it in {sheet.source.absolute().parent.parent}"
            sheet.error(where, f"there is no {local} on this machine{hint}")


def _token(sheet: Sheet) -> None:
    """Without it whoever reaches a node runs code there."""
    mounts = sheet.table("file_mounts")
    remote = next((r for r in mounts if str(r).endswith("/.ray/auth_token")), None)
    if remote is None:
        sheet.error(("file_mounts",), f'the token is missing: add "{TOKEN}": {TOKEN}')
        return
    where, path = ("file_mounts", remote), Path(str(mounts[remote])).expanduser()
    if not path.is_file():
        sheet.error(where, f"there is no token in {path}; {MAKE_TOKEN}")
        return
    token = path.read_text(errors="replace").strip()
    if not token:
        sheet.error(where, f"{path} is empty; remove it and {MAKE_TOKEN}")
    elif not re.fullmatch(r"[0-9a-f]{64}", token):
        text = f"{path} holds no token of Ray's (64 hexadecimal digits); remove it and {MAKE_TOKEN}"
        sheet.error(where, text)
    if mode := stat.S_IMODE(path.stat().st_mode) & 0o077:
        text = f"{path} can be read by others (mode bits {mode:03o}); run `chmod 600 {path}`"
        sheet.error(where, text)


def _commands(sheet: Sheet, *lists: str) -> list[tuple[Where, str]]:
    found: list[tuple[Where, str]] = []
    for name in lists:
        value = sheet.get(name)
        for i, command in enumerate(value if isinstance(value, list) else []):
            if isinstance(command, str):
                found.append(((name, i), command))
    return found


SETUP = ("initialization_commands", "setup_commands", "head_setup_commands")
SETUP += ("worker_setup_commands",)


def _start_commands(sheet: Sheet, kind: str) -> None:
    """How Ray is started: with the token, the dashboard on loopback, the right autoscaler."""
    everywhere = any("RAY_AUTH_MODE=token" in c for _, c in _commands(sheet, *SETUP))
    for name, needed in (
        ("head_start_ray_commands", "--head"),
        ("worker_start_ray_commands", "--address="),
    ):
        starts = [(w, c) for w, c in _commands(sheet, name) if re.search(r"\bray start\b", c)]
        if not any(needed in c for _, c in starts):
            text = f"no `ray start {needed}` in it; Ray's own has no token"
            text += " and shows the dashboard to the whole network" if needed == "--head" else ""
            sheet.error((name,), text)
        for where, command in starts:
            if not everywhere and "RAY_AUTH_MODE=token" not in command:
                text = "write `export RAY_AUTH_MODE=token;` before `ray start`: without it the"
                sheet.error(where, f"{text} cluster runs whatever anyone sends it")
    for where, command in _commands(sheet, *SETUP, *("head_start_ray_commands",)) + _commands(
        sheet, "worker_start_ray_commands"
    ):
        if mode := re.search(r"RAY_AUTH_MODE=[\"']?(?!token\b)(\w+)", command):
            sheet.error(where, f"RAY_AUTH_MODE={mode[1]} switches the token off; write token")
    for where, command in _commands(sheet, "head_start_ray_commands"):
        if not re.search(r"\bray start\b.*--head", command, re.DOTALL):
            continue
        host = re.search(r"--dashboard-host[= ][\"']?([^\s\"']+)", command)
        if host is None or host[1] not in ("127.0.0.1", "localhost", "::1"):
            got = f"got {host[1]}" if host else "it is missing"
            text = f"write --dashboard-host=127.0.0.1 ({got}): it is reached through SSH,"
            sheet.error(where, f"{text} `ray dashboard {sheet.source}`")
        if "--autoscaling-config" not in command:
            text = (
                "write --autoscaling-config=~/ray_bootstrap_config.yaml, or no worker ever starts"
            )
            sheet.error(where, text)
        if kind == "local" and "RAY_enable_autoscaler_v2=0" not in command:
            text = "write `export RAY_enable_autoscaler_v2=0;` before `ray start`: v2 does not know"
            sheet.error(where, f"{text} machines of one's own and starts no worker reliably")


def _ray_pinned(sheet: Sheet) -> None:
    """One Ray on all machines: nodes of two versions refuse each other, after they were paid."""
    own = ray_version()
    pins = 0
    for remote, local in sheet.table("file_mounts").items():
        path = Path(str(local)).expanduser()
        if not str(remote).endswith("requirements.txt") or not path.is_file():
            continue
        where: Where = ("file_mounts", remote)
        pin = re.search(r"(?m)^ray(?:\[[^\]]*\])?==([^\s;#]+)", path.read_text(errors="replace"))
        pins += 1
        if pin is None:
            sheet.error(where, f"{local} does not pin Ray; it must have ray=={own}")
        elif pin[1] != own:
            sheet.error(where, f"{local} has ray=={pin[1]}, this machine {own}: make them equal")
    for where, command in _commands(sheet, *SETUP):
        if not re.search(r"\bpip3? (?:install|sync)\b", command):
            continue
        for found in re.finditer(
            r"(?<![\w./-])ray(?:\[[^\]]*\])?(==[^\s\"';]+)?(?=[\s\"';]|$)", command
        ):
            pins += 1
            if found[1] != f"=={own}":
                sheet.error(where, f"installs {found[0].strip()}; pin it to ray=={own}")
    docker = sheet.table("docker")
    for key in ("image", "head_image", "worker_image"):
        if image := docker.get(key):
            from bgray.kuberay_check import check_image

            pins += 1
            check_image(sheet, ("docker", key), str(image), own)
    if not pins:
        text = f"nothing pins Ray to this machine's {own}: mount requirements.txt and install it"
        sheet.error(("setup_commands",) if "setup_commands" in sheet.data else (), text)


def _local(sheet: Sheet) -> None:
    """Machines of one's own."""
    head, workers = sheet.get("provider", "head_ip"), sheet.get("provider", "worker_ips")
    addresses: list[tuple[Where, Any]] = [(("provider", "head_ip"), head)]
    for i, worker in enumerate(workers if isinstance(workers, list) else []):
        addresses.append((("provider", "worker_ips", i), worker))
    seen: set[Any] = set()
    for where, address in addresses:
        if str(address).startswith(DOCUMENTATION):
            text = f"{address} is a placeholder: write your machines' addresses"
            sheet.error(where, text)
        elif str(address) in seen:
            sheet.error(where, f"{address} is written twice; a machine is one node")
        seen.add(str(address))
    if workers == []:
        sheet.warn(("provider", "worker_ips"), "no workers, and the head offers no CPU by default")
    key = sheet.get("auth", "ssh_private_key")
    if isinstance(key, str) and not Path(key).expanduser().is_file():
        sheet.error(("auth", "ssh_private_key"), f"there is no {key} on this machine")
