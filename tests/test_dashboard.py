import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from browser import dashboard

from bgray import storage
from bgray.compare import compare
from bgray.dashboard import Server, guard, main
from bgray.page import build
from bgray.problems import ConfigError
from bgray.reading import Reader
from bgray.specimen import Made, make
from bgray.watching import Watch

LOCAL = {"Host": "localhost:8050"}
VARIANTS = [
    Made("baseline"),
    Made("longer", {"model.kernels": [7, 23, 41]}, gain=0.05),
    Made(
        "wide", {"model.channels": [48, 96]}, state="failed", reason="RuntimeError: <b>", until=60
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("results") / "kernels")
    make(place, VARIANTS, steps=100, evaluations=5, items=4, clips=1, clip_seconds=0.5)
    return place


def app_of(folder, token=None, port=8050):
    app = build(Watch(folder))
    guard(app, token, port)
    return app.server.test_client()


@pytest.fixture(scope="module")
def client(folder):
    return app_of(folder)


@pytest.fixture(scope="module")
def server(folder):
    with dashboard(folder) as made:
        yield made


def state(client, **query):
    return client.get("/api/state", query_string=query, headers=LOCAL)


# --- who may see it


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8050", "127.0.0.1:9", "127.0.0.2", "[::1]:8050"]
)
def test_this_machines_own_names_are_answered_whatever_the_port(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8050", "127.0.0.1.evil.example", "localhost@evil", "[::1"],
)
@pytest.mark.parametrize("path", ["/", "/api/state", "/assets/page.js", "/_dash-layout"])
def test_a_foreign_host_header_is_refused_on_every_path(client, host, path):
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 403
    assert b"kernels" not in answer.data


def test_elsewhere_only_the_token_lets_in_and_does_not_stay_in_the_address(folder):
    client = app_of(folder, token="s3cret")
    for path in (
        "/",
        "/?token=",
        "/?token=s3cre",
        "/?token=s3cretx",
        "/api/state",
        "/assets/page.js",
    ):
        answer = client.get(path, headers={"Host": "gpu7:8050"})
        assert answer.status_code == 401
        assert "open the address" in answer.text
    assert client.post("/_dash-update-component?token=s3cret", json={}).status_code == 401

    answer = client.get("/?token=s3cret&a=b", headers={"Host": "gpu7:8050"})
    assert answer.status_code == 303
    assert answer.headers["Location"] == "/?a=b"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/api/state", headers={"Host": "gpu7:8050"}).status_code == 200
    for wrong in ("wröng", "s3cre", ""):
        other = app_of(folder, token="s3cret")
        other.set_cookie("bgray-8050", wrong, domain="gpu7")
        assert other.get("/", headers={"Host": "gpu7:8050"}).status_code == 401


def test_the_way_back_from_the_token_never_leads_to_another_host(folder):
    client = app_of(folder, token="s3cret")
    for path in ("//evil.example/?token=s3cret", "/%5Cevil.example?token=s3cret"):
        place = client.get(path, headers={"Host": "gpu7"}).headers["Location"]
        assert re.match(r"/[^/\\]", place) or place == "/"


def test_only_another_address_than_loopback_asks_for_a_token(folder):
    watch = Watch(folder)
    here, there = Server(watch), Server(watch, host="0.0.0.0")
    try:
        assert here.token is None
        assert here.address == f"http://127.0.0.1:{here.port}/"
        assert any(f"ssh -L {here.port}:127.0.0.1:{here.port} " in line for line in here.advice())
        assert len(there.token or "") >= 32
        assert there.address.endswith(f":{there.port}/?token={there.token}")
        assert there.token != Server(watch, host="0.0.0.0").token
    finally:
        here._socket.close()
        there._socket.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_sites_page_cannot_post(client, headers):
    answer = client.post("/_dash-update-component", json={}, headers={**LOCAL, **headers})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/", "/api/state", "/assets/page.js", "/nothing"])
def test_every_answer_forbids_other_hosts_frames_and_guesses(client, path):
    headers = client.get(path, headers=LOCAL).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "'unsafe-inline'" not in policy["script-src"]
    assert "http" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Cache-Control" in headers


def test_the_pages_inline_scripts_are_those_that_the_policy_names(client):
    from base64 import b64encode
    from hashlib import sha256

    answer = client.get("/", headers=LOCAL)
    inline = re.findall(
        r"<script(?![^>]*(?:src=|application/json))[^>]*>(.*?)</script>", answer.text, re.S
    )
    assert inline
    for script in inline:
        assert (
            b64encode(sha256(script.encode()).digest()).decode()
            in answer.headers["Content-Security-Policy"]
        )


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../page.py",
        "/assets/%2e%2e/page.py",
        "/assets/..%2fpage.py",
        "/assets/%2fetc/passwd",
        "/nothing",
        "/api/listening/file/{run}/..%2frun.json?sweep=kernels",
        "/api/listening/file/{run}/%2e%2e/run.json?sweep=kernels",
        "/api/listening/file/..%2f{run}/000-target.wav?sweep=kernels",
        "/api/listening/file/{run}/000-target.wav?sweep=..%2fkernels",
        "/api/trial?sweep=kernels&run=..%2f..",
        "/api/trial?sweep=..&run={run}",
    ],
)
def test_paths_out_of_the_folder_are_not_found(folder, server, path):
    run = next(iter(Reader(folder).read().trials))
    # A socket, because clients tidy up a path before they ask for it.
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        text = f"GET {path.format(run=run)} HTTP/1.0\r\nHost: localhost\r\n\r\n"
        line.sendall(text.encode())
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    assert int(answer.split()[1]) == 404
    for secret in (b"root:", b"import dash", b'"attempts"'):
        assert secret not in answer


# --- what is watched


def test_a_taken_port_gives_the_next_free_one(folder):
    watch = Watch(folder)
    first = Server(watch)
    try:
        second = Server(watch, port=first.port)
        assert first.port < second.port <= first.port + 20
        second._socket.close()
    finally:
        first._socket.close()


def test_an_address_of_another_machine_is_one_line(folder):
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.1 port"):
        Server(Watch(folder), host="192.0.2.1", port=8050)


def test_what_is_no_sweep_is_refused_in_one_line_with_what_was_meant(folder, tmp_path, capsys):
    run = next(iter(Reader(folder).read().trials))
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").write_bytes(b"")
    cases = {
        folder[:-1]: f"no such folder, did you mean {folder}?",
        str(tmp_path / "nothing" / "like it"): "no such folder; give a sweep's folder",
        f"{folder}/sweep.json": "is a file",
        str(tmp_path / "music"): "holds no sweep",
        f"{folder}/{run}": "is one run",
    }
    for place, text in cases.items():
        with pytest.raises(SystemExit) as ended:
            main([place, "--no-browser"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert text in error
        assert "Traceback" not in error


def test_a_folder_without_a_run_is_waited_for_and_then_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("bgray.watching.LOCAL_SECONDS", 0.0)
    results = tmp_path / "results"
    results.mkdir()
    client = app_of(str(results))
    found = state(client).json
    assert (found["sweeps"], found["sweep"]) == ([], None)
    make(str(results / "one"), VARIANTS[:1], seeds=1, clips=0)
    assert state(client).json["sweeps"] == ["one"]
    make(str(results / "two"), VARIANTS[:2], seeds=1, clips=0)
    assert state(client, sweep="two").json["sweeps"] == ["one", "two"]
    assert [row["label"] for row in state(client, sweep="two").json["rows"]] == [
        "baseline",
        "longer",
    ]


def test_a_sweep_on_s3_is_shown_like_a_local_one(folder, s3):
    make(f"{s3}/results/kernels", VARIANTS, steps=100, evaluations=5, items=4, clips=0)
    watch = Watch(f"{s3}/results")
    assert watch.seconds == 15
    client = app_of(f"{s3}/results")
    there, here = state(client).json, state(app_of(folder)).json
    assert [row["cells"] for row in there["rows"]] == [row["cells"] for row in here["rows"]]
    with pytest.raises(ConfigError, match="no such folder, did you mean s3://bgray-test/results"):
        Watch(f"{s3}/result")


# --- what is shown


def test_nothing_is_sent_again_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("bgray.watching.LOCAL_SECONDS", 0.0)
    place = str(tmp_path / "kernels")
    make(place, VARIANTS, steps=100, items=4, clips=0)
    client = app_of(place)
    first = state(client).json
    assert state(client, seen=first["version"]).status_code == 204
    run = first["rows"][1]["trials"][0]["id"]
    path = f"{place}/{run}/run.json"
    info = json.loads(storage.read_bytes(path))
    storage.write_bytes(path, json.dumps({**info, "parameters": 12_000_000}).encode())
    again = state(client, seen=first["version"])
    assert again.status_code == 200
    assert again.json["rows"][1]["cells"]["parameters"] == "12.00M"


def test_the_pages_numbers_are_those_of_the_comparison(folder, client):
    results = Reader(folder).read()
    rows = {row["id"]: row["cells"] for row in state(client).json["rows"]}
    for metric in ("val_stft", "val_si_sdr"):
        comparison = compare(results.variants, name="kernels", metric=metric)
        table = comparison.table()
        printed = {
            name: list(column.cells)
            for name, column in zip(
                ("variant", "seeds", "step", "mean", "difference", "items", "verdict"),
                table.columns,
                strict=True,
            )
        }
        for place, row in enumerate(comparison.rows):
            cells = rows[row.id]
            assert cells[metric] == printed["mean"][place]
            assert cells[f"{metric} difference"] == printed["difference"][place]
            if metric == "val_stft":
                assert cells["seeds"] == printed["seeds"][place]
                assert cells["step"] == printed["step"][place]
    assert state(client).json["method"] == compare(results.variants, name="kernels").method()


def test_a_failed_trial_has_its_reason_in_the_table_and_its_files_in_the_details(folder, client):
    rows = state(client).json["rows"]
    failed = next(t for row in rows for t in row["trials"] if t["state"] == "failed")
    assert failed["bad"]
    assert failed["reason"] == "RuntimeError: <b>"
    storage.write_bytes(f"{folder}/{failed['id']}/error.txt", b"Traceback\nRuntimeError: <b>\n")
    query = {"sweep": "kernels", "run": failed["id"]}
    found = client.get("/api/trial", query_string=query, headers=LOCAL).json
    assert found["changes"] == [["model.channels", "[32, 64]", "[48, 96]"]]
    files = dict(found["files"])
    assert files["error.txt"].endswith("RuntimeError: <b>\n")
    last = json.loads(files["metrics.jsonl, last lines"].splitlines()[-1])
    assert last["step"] == 60


def test_a_damaged_run_is_said_and_the_others_are_shown(tmp_path):
    place = str(tmp_path / "kernels")
    make(place, VARIANTS, steps=100, items=4, clips=0)
    run = next(iter(Reader(place).read().trials))
    storage.write_bytes(f"{place}/{run}/run.json", b'{"state": "fin')
    found = state(app_of(place)).json
    assert any(run in text and "damaged" in text for text in found["problems"])
    assert len(found["rows"]) == 3


def test_a_driver_that_died_is_said_with_the_command_that_goes_on(tmp_path):
    place = str(tmp_path / "kernels")
    make(place, [*VARIANTS, Made("later", state="waiting")], steps=100, items=4, clips=0)
    from bgray.leases import here

    lease = {**here(), "what": "sweep", "command": "python -m bgray.sweep x.yaml", "pid": 2**22 - 1}
    storage.write_bytes(f"{place}/lease.json", json.dumps(lease).encode())
    driver = state(app_of(place)).json["driver"]
    assert driver["state"] == "dead"
    assert driver["command"] == "python -m bgray.sweep x.yaml"


def test_a_link_to_rays_dashboard_is_shown_only_while_the_driver_runs_and_only_to_http(tmp_path):
    from bgray.leases import held

    place = str(tmp_path / "kernels")
    make(place, VARIANTS, steps=100, items=4, clips=0)
    session = f"{place}/.ray/session.json"
    storage.write_bytes(session, b'{"ray_dashboard": "http://127.0.0.1:8265"}')
    assert state(app_of(place)).json["ray"] is None
    with held(place, "sweep"):
        assert state(app_of(place)).json["ray"] == "http://127.0.0.1:8265"
        storage.write_bytes(session, b'{"ray_dashboard": "javascript:alert(1)"}')
        assert state(app_of(place)).json["ray"] is None


def test_a_figure_is_drawn_for_the_view_that_the_page_asks_for(client, folder):
    def figure(id, **view):
        asked = {
            "output": f"{id}.figure",
            "outputs": {"id": id, "property": "figure"},
            "inputs": [{"id": f"{id}-view", "property": "data", "value": view}],
            "changedPropIds": [f"{id}-view.data"],
        }
        answer = client.post("/_dash-update-component", json=asked, headers=LOCAL)
        assert answer.status_code == 200
        return answer.json["response"][id]["figure"]

    view = {"sweep": "kernels", "version": "1", "chosen": [], "axis": "step"}
    score = figure("curves", **view, name="val_stft")
    loss = figure("curves", **view, name="loss")
    assert "val_stft" in json.dumps(score["layout"]["yaxis"])
    assert score["layout"]["uirevision"] != loss["layout"]["uirevision"]
    again = figure("curves", **{**view, "version": "2"}, name="val_stft")
    assert again["layout"]["uirevision"] == score["layout"]["uirevision"]
    assert figure("quality", **view, metric="val_si_sdr", cost="minutes")["data"]
    assert figure("parallel", **view, metric="val_stft")["data"]


@pytest.mark.slow
def test_the_command_says_its_address_answers_there_and_ends_at_ctrl_c(folder):
    command = [sys.executable, "-m", "bgray.dashboard", folder, "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{address}api/state") as answer:
            assert len(json.load(answer)["rows"]) == 3
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.endswith("ended\n")
    assert error == ""
