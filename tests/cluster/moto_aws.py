"""AWS for a `Lab`: moto as a server on the bridge, with a log of calls and faults on request."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

REGION = "us-west-2"
PORT = 5055
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
PROFILES = ("bgray-head", "bgray-worker")


class Moto:
    """The server's handle: start it in a lab, set its faults, read what it was asked.

    env: what a host needs to talk to it (an endpoint and a region; no keys: see FakeCloud for how
    instances get theirs). keys: credentials for a host without an instance profile (the laptop).
    """

    def __init__(self, lab, profiles: tuple[str, ...] = PROFILES):
        from .lab import GATEWAY

        self.lab = lab
        self._clients: dict[str, Any] = {}
        self.url = f"http://{GATEWAY}:{PORT}"
        self.env = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
        }
        self.keys = dict(KEYS)
        self.folder = lab.folder / "moto"
        self.folder.mkdir(exist_ok=True)
        self._faults, self._log = self.folder / "faults.json", self.folder / "calls.jsonl"
        self._log.touch()
        self.faults()
        with (self.folder / "console.log").open("w") as console:
            self._process = lab.spawn(
                [sys.executable, __file__, GATEWAY, str(PORT), str(self.folder)],
                env={**os.environ, **KEYS, "AWS_DEFAULT_REGION": REGION},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self._wait()
        iam = self.client("iam")
        with lab.network():
            for name in profiles:
                iam.create_instance_profile(InstanceProfileName=name)
                iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
                iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)

    def _wait(self):
        end = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), self.lab.network():
                socket.create_connection((self.url[7:].split(":")[0], PORT), timeout=1).close()
                return
            time.sleep(0.1)
        text = (self.folder / "console.log").read_text()
        raise RuntimeError(f"moto did not start (exit status {self._process.poll()}):\n{text}")

    def client(self, service: str):
        """A boto3 client that does not retry, so that a test sees the faults; call it inside
        `with lab.network():`, where moto can be reached. The same one each time: making one takes
        half a second."""
        import boto3
        from botocore.config import Config

        if service not in self._clients:
            self._clients[service] = boto3.Session().client(
                service,
                region_name=REGION,
                endpoint_url=self.url,
                aws_access_key_id="testing",
                aws_secret_access_key="testing",
                config=Config(retries={"total_max_attempts": 1}),
            )
        return self._clients[service]

    def faults(
        self,
        *,
        no_spot: bool | list[str] = False,
        no_capacity: bool | list[str] = False,
        s3: str = "",
        s3_seconds: float = 3600.0,
        s3_delay_seconds: float = 2.0,
        s3_paths: str = "",
    ) -> None:
        """Sets all faults at once; faults() ends them.

        no_spot: spot RunInstances end in InsufficientInstanceCapacity, for all or the listed
        instance types; no_capacity: every RunInstances. s3, for s3_seconds from now, on requests
        whose path contains s3_paths: "503" (SlowDown), "slow" (s3_delay_seconds before each
        answer), "cut" (half of a GET's body under its full Content-Length), "short" (half a body
        with the Content-Length to match).
        """
        if s3 not in ("", "503", "slow", "cut", "short"):
            raise ValueError(f"s3={s3!r}: one of '', '503', 'slow', 'cut', 'short'")
        text = json.dumps(
            {
                "no_spot": no_spot,
                "no_capacity": no_capacity,
                "s3": s3,
                "s3_until": time.time() + s3_seconds,
                "s3_delay_seconds": s3_delay_seconds,
                "s3_paths": s3_paths,
            }
        )
        new = self._faults.with_suffix(".new")
        new.write_text(text)
        new.replace(self._faults)

    def calls(self, action: str | None = None) -> list[dict]:
        """Calls so far, oldest first: t (time.time()), host, method, path, action (EC2 and IAM),
        params, status, fault (which one of ours answered). Only those of one action if named."""
        calls = [json.loads(line) for line in self._log.read_text().splitlines() if line]
        return [call for call in calls if action is None or call["action"] == action]


def _matches(which, name):
    return which is True or (isinstance(which, list) and name in which)


class Server:
    """WSGI: moto behind a log and faults."""

    def __init__(self, app, folder: Path):
        self.app, self.file = app, folder / "faults.json"
        self.log = (folder / "calls.jsonl").open("a", buffering=1)

    def __call__(self, environ, start_response):
        faults = json.loads(self.file.read_text())
        params = {}
        if "urlencoded" in environ.get("CONTENT_TYPE", ""):
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            params = dict(urllib.parse.parse_qsl(body.decode("utf8", "replace")))
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        answer = {}

        def start(status, headers, exc_info=None):
            answer.update(status=status, headers=headers)
            return lambda data: None

        fault = self._ec2_fault(faults, params) or self._s3_fault(faults, environ)
        if fault == "InsufficientInstanceCapacity":
            text = (
                "<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>We "
                f"currently do not have sufficient {params.get('InstanceType')} capacity in the "
                "Availability Zone you requested.</Message></Error></Errors>"
                "<RequestID>lab</RequestID></Response>"
            )
            start("500 Internal Server Error", [("Content-Type", "text/xml")])
            body = text.encode()
        elif fault == "503":
            text = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message>"
            start("503 Slow Down", [("Content-Type", "application/xml")])
            body = f"{text}</Error>".encode()
        else:
            if fault == "slow":
                time.sleep(faults["s3_delay_seconds"])
            answered = self.app(environ, start)
            body = b"".join(answered)
            if hasattr(answered, "close"):
                answered.close()
        headers, sent = answer["headers"], body
        if fault in ("cut", "short"):
            sent = body[: len(body) // 2]
            length = len(sent if fault == "short" else body)
            headers = [item for item in headers if item[0].lower() != "content-length"]
            headers.append(("Content-Length", str(length)))
        call = {
            "t": time.time(),
            "host": environ.get("REMOTE_ADDR"),
            "method": method,
            "path": path,
            "action": params.get("Action"),
            "params": params,
            "status": answer["status"],
            "fault": fault,
        }
        self.log.write(json.dumps(call) + "\n")
        start_response(answer["status"], headers)
        return [sent]

    def _ec2_fault(self, faults, params):
        if params.get("Action") == "RunInstances":
            kind = params.get("InstanceType")
            spot = params.get("InstanceMarketOptions.MarketType") == "spot"
            if _matches(faults["no_capacity"], kind) or (
                spot and _matches(faults["no_spot"], kind)
            ):
                return "InsufficientInstanceCapacity"
        return ""

    def _s3_fault(self, faults, environ):
        if "/s3/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return ""
        if time.time() > faults["s3_until"] or faults["s3_paths"] not in environ["PATH_INFO"]:
            return ""
        if faults["s3"] in ("cut", "short") and environ["REQUEST_METHOD"] != "GET":
            return ""
        return faults["s3"]


def main() -> None:
    """moto_aws.py ADDRESS PORT FOLDER: serves until it is killed."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_, **__):  # calls.jsonl has it
            pass

        def address_string(self):
            return self.client_address[0]

    address, port, folder = sys.argv[1:]
    server = Server(DomainDispatcherApplication(create_backend_app), Path(folder))
    run_simple(address, int(port), server, threaded=True, request_handler=Quiet)


if __name__ == "__main__":
    main()
