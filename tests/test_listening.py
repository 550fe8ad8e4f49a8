import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from listening_page import RATE, Trial, app, put, sweep, tone

from bgray import blind, clips, listening, storage
from bgray.hearing import guessing
from bgray.listening import PREFIX, results_of
from bgray.problems import ConfigError

HERE = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def made(tmp_path):
    return sweep(tmp_path / "sweep")


@pytest.fixture
def client(made):
    return app(made).test_client()


def lanes(client, made, variants=("one", "two", "three"), **asked):
    query = {"sweep": made.name, "variant": list(variants), **asked}
    answer = client.get(f"{PREFIX}/lanes", query_string=query)
    assert answer.status_code == 200
    return answer.get_json()


def post(client, path, body, **headers):
    return client.post(f"{PREFIX}{path}", json=body, headers=headers or HERE)


# --- which clips


def test_lanes_are_target_input_and_variants_at_the_last_step_that_all_have(client, made):
    put(made.runs[0], "000-step-000150.wav", tone(1))  # the others are not there yet
    found = lanes(client, made)
    assert [lane["label"] for lane in found["lanes"]] == [
        "target", "input", "variant one", "variant two", "variant three",
    ]  # fmt: skip
    assert (found["step"], found["steps"], found["seed"]) == (100, [50, 100], 0)
    assert (found["items"], found["sources"]) == ([0, 4], [None])
    chosen = lanes(client, made, ["two", "one"], step=50, item=4, seed=1)
    assert [lane["seed"] for lane in chosen["lanes"][2:]] == [1, 1]
    assert all(
        lane["url"].split("?")[0].endswith("/004-step-000050.wav") for lane in chosen["lanes"][2:]
    )  # noqa: E501
    assert [lane["label"] for lane in chosen["lanes"][2:]] == ["variant two", "variant one"]


def test_a_step_that_only_some_lanes_have_is_not_taken(client, made):
    put(made.runs[0], "000-step-000150.wav", tone(1))
    found = lanes(client, made, step=150)
    assert found["step"] == 100
    assert len(found["lanes"]) == 5
    assert lanes(client, made, ["one"], step=150)["step"] == 150


def test_one_seed_serves_all_lanes_where_they_share_one(made):
    runs = [run for run in made.runs if not (run.variant == "two" and run.seed == 0)]
    assert clips.choose(runs, ["one", "two", "three"]).seed == 1
    runs = [run for run in runs if not (run.variant == "one" and run.seed == 1)]
    found = clips.choose(runs, ["one", "two"])
    assert found.seed is None
    assert [one.run.seed for one in found.lanes] == [0, 1]


def test_a_variant_without_clips_is_named_and_the_rest_is_heard(client, made):
    made.runs.append(Trial("b" * 12, made.url + "/none", "late", "a late one", 0))
    found = lanes(client, made, ["one", "late", "unheard-of"])
    assert [lane["kind"] for lane in found["lanes"]] == ["target", "input", "lane"]
    assert {one["label"] for one in found["missing"]} == {"a late one", "unheard-of"}
    assert found["step"] == 100


def test_separated_sources_are_chosen_by_name_and_share_one_input(tmp_path):
    run = Trial("a" * 12, str(tmp_path / "a"), "one", "one", 0)
    put(run, "000-input.wav", tone(100))
    for voice in ("vocals", "bass"):
        put(run, f"000-target-{voice}.wav", tone(100))
        put(run, f"000-step-000010-{voice}.wav", tone(100))
    found = clips.choose([run], ["one"], source="vocals")
    assert found.sources == ("bass", "vocals")
    assert found.lanes[0].name == "000-step-000010-vocals.wav"
    assert {kind: one.name for kind, one in found.references.items()} == {
        "target": "000-target-vocals.wav",
        "input": "000-input.wav",
    }


def test_a_piano_roll_comes_with_its_picture(tmp_path):
    run = Trial("a" * 12, str(tmp_path / "a"), "one", "one", 0)
    put(run, "000-step-000010.wav", tone(100))
    (Path(run.url) / "clips" / "000-step-000010.png").write_bytes(b"\x89PNG")
    assert clips.choose([run], ["one"]).lanes[0].picture == "000-step-000010.png"


def test_loudness_and_gains_are_of_the_files(client, made):
    found = {lane["label"]: lane for lane in lanes(client, made)["lanes"]}
    assert found["target"]["gain_db"] == 0
    import pyloudnorm

    meter = pyloudnorm.Meter(RATE, filter_class="DeMan")
    target, three = (
        meter.integrated_loudness(tone(hz, 1, amplitude))
        for hz, amplitude in ((200, 0.2), (500, 0.05))
    )
    assert found["variant three"]["gain_db"] == pytest.approx(target - three, abs=0.01)
    assert found["variant three"]["lufs"] == pytest.approx(three, abs=0.01)


def test_a_clip_that_is_written_anew_has_another_address(client, made):
    before = [lane["url"] for lane in lanes(client, made)["lanes"]]
    assert [lane["url"] for lane in lanes(client, made)["lanes"]] == before
    put(made.runs[2], "000-step-000100.wav", tone(3000, 1, 0.01))
    after = [lane["url"] for lane in lanes(client, made)["lanes"]]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, True]
    assert client.get(after[3]).status_code == 200


def test_the_lane_that_makes_all_quieter_is_named(client, made):
    assert lanes(client, made)["trim_of"] is None
    put(made.runs[4], "000-step-000100.wav", np.where(np.arange(RATE) % 4000, 0.0, 0.9))
    found = lanes(client, made)
    assert found["trim_db"] < 0
    assert found["trim_of"] == "variant three"


def test_silence_says_so_and_a_damaged_clip_says_why(client, made):
    put(made.runs[0], "000-step-000100.wav", np.zeros(RATE))
    Path(made.runs[2].url, "clips", "000-step-000100.wav").write_bytes(b"RIFF, but not much more")
    found = lanes(client, made)["lanes"]
    assert (found[2]["silent"], found[2]["lufs"], found[2]["gain_db"]) == (True, None, 0)
    assert found[3]["error"].endswith("000-step-000100.wav: Format not recognised")
    assert found[4]["error"] is None


# --- files


def file(client, made, path, **headers):
    return client.get(f"{PREFIX}/file/{path}", query_string={"sweep": made.name}, headers=headers)


def test_a_clip_comes_byte_by_byte_with_its_type_and_in_ranges(client, made):
    run = made.runs[0]
    there = Path(run.url, "clips", "000-target.wav").read_bytes()
    whole = file(client, made, f"{run.id}/000-target.wav")
    assert whole.data == there
    assert whole.headers["Content-Type"] == "audio/wav"
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    part = file(client, made, f"{run.id}/000-target.wav", Range="bytes=100-199")
    assert (part.status_code, part.data) == (206, there[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(there)}"


@pytest.mark.parametrize(
    "name",
    [
        "../run.json",
        "..%2frun.json",
        "%2e%2e/run.json",
        "..%5crun.json",
        "/etc/passwd",
        "000-target.wav%00.json",
        "notes.txt",
        "000-step-000999.wav",
        "../clips/000-target.wav",
    ],
)
def test_only_names_in_the_runs_listing_are_served(client, made, name):
    run = made.runs[0]
    Path(run.url, "run.json").write_text("secret")
    Path(run.url, "clips", "notes.txt").write_text("secret")
    for path in (f"{run.id}/{name}", f"{run.id}%2f{name}", f"..%2f{run.id}/{name}"):
        answer = file(client, made, path)
        assert answer.status_code == 404, path
        assert b"secret" not in answer.data


def test_a_listed_name_that_leads_elsewhere_is_no_clip(client, made):
    run = made.runs[0]
    Path(run.url, "run.json").write_text("secret")
    run.only = ("../run.json", "000-step-000100-../../run.json")
    for name in ("..%2frun.json", "000-step-000100-..%2f..%2frun.json"):
        assert file(client, made, f"{run.id}/{name}").status_code == 404


def test_a_clip_that_lies_there_but_is_not_listed_is_not_served(client, made):
    run = made.runs[0]
    run.only = ("000-target.wav",)
    assert file(client, made, f"{run.id}/000-target.wav").status_code == 200
    assert file(client, made, f"{run.id}/000-input.wav").status_code == 404


def test_an_unknown_sweep_or_run_is_a_plain_404(client, made):
    assert file(client, made, "f" * 12 + "/000-target.wav").status_code == 404
    answer = client.get(f"{PREFIX}/lanes", query_string={"sweep": "other"})
    assert (answer.status_code, answer.get_json()) == (404, {"error": "no such sweep"})


# --- blind tests


def abx(made, **more):
    ids = [run.id for run in made.runs if run.seed == 0]
    asked = {"sweep": made.name, "kind": "abx", "lanes": ids[:2], "item": 0, "source": None}
    return {**asked, "step": 100, "trials": 8, "who": " An\nna ", **more}


def ranking(made, **more):
    ids = [run.id for run in made.runs if run.seed == 0]
    asked = {"sweep": made.name, "kind": "ranking", "lanes": ids, "items": [0, 4], "source": None}
    return {**asked, "step": 100, "who": None, **more}


def heard(client, question):
    """Name to samples (T,), of a question's sounds."""
    found = {}
    for name, token in question["sounds"].items():
        answer = client.get(f"{PREFIX}/blind/{question['session']}/{token}")
        assert answer.status_code == 200
        found[name] = soundfile.read(io.BytesIO(answer.data), dtype="float32")[0]
    return found


def pitch(samples):
    return round(np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples))


def written(made):
    folder = Path(made.url, "listening")
    return [json.loads(p.read_text()) for p in sorted(folder.iterdir())] if folder.is_dir() else []


def test_abx_from_the_first_question_to_the_p_value(client, made):
    question = post(client, "/blind", abx(made)).get_json()
    assert not written(made)
    seen = []
    for number in range(1, 9):
        assert (question["number"], question["of"]) == (number, 8)
        sounds = heard(client, question)
        assert (pitch(sounds["a"]), pitch(sounds["b"])) == (300, 400)
        x = "a" if pitch(sounds["x"]) == 300 else "b"
        assert np.array_equal(sounds["x"], sounds[x])
        given = x if number != 3 else "ab"[x == "a"]  # one wrong answer
        seen.append(x)
        old = question
        question = post(
            client, f"/blind/{old['session']}", {"number": number, "answer": given}
        ).get_json()
        assert len(written(made)[0]["answers"]) == number
        assert "right" not in question or number == 8
        gone = client.get(f"{PREFIX}/blind/{old['session']}/{old['sounds']['x']}")
        assert gone.status_code == 404
    assert (question["right"], question["trials"], question["done"]) == (7, 8, True)
    assert question["p"] == pytest.approx(guessing(7, 8))
    (file,) = written(made)
    assert [answer["x"] for answer in file["answers"]] == seen
    assert (file["who"], file["complete"], file["trials"], file["step"]) == ("An na", True, 8, 100)
    assert [lane["variant"] for lane in file["lanes"]] == ["one", "two"]
    assert len(file["gains_db"]) == 2
    (pair,) = results_of(made.url).pairs
    assert (pair.right, pair.trials, pair.sessions, pair.broken_off) == (7, 8, 1, 0)
    assert pair.p_value == pytest.approx(guessing(7, 8))


def test_nothing_but_the_sound_tells_the_page_which_one_x_is(client, made):
    """Neither the answer's fields and headers nor lengths differ between questions."""
    kinds = set()
    question = post(client, "/blind", abx(made, trials=20)).get_json()
    for number in range(1, 20):
        shape = sorted(question), sorted(question["sounds"])
        headers = set()
        for token in question["sounds"].values():
            answer = client.get(f"{PREFIX}/blind/{question['session']}/{token}")
            headers.add(tuple(sorted((k, v) for k, v in answer.headers if k != "Date")))
        assert len(headers) == 1
        assert len({len(token) for token in question["sounds"].values()}) == 1
        kinds.add(str(shape))
        text = json.dumps(question)
        assert not any(run.id in text or run.label in text for run in made.runs)
        question = post(
            client, f"/blind/{question['session']}", {"number": number, "answer": "a"}
        ).get_json()
    assert len(kinds) == 1
    assert {answer["x"] for answer in written(made)[0]["answers"]} == {"a", "b"}


def test_what_is_tested_blindly_is_equally_loud_and_never_clips(client, made):
    loud = tone(3000, amplitude=0.99)  # the quiet lane's gain would take it far beyond full scale
    put(made.runs[0], "000-target.wav", tone(200, amplitude=0.9))
    put(made.runs[0], "000-step-000100.wav", loud)
    put(made.runs[2], "000-step-000100.wav", np.where(np.arange(RATE) % 4000, 0.0, 0.9))
    question = post(client, "/blind", abx(made)).get_json()
    from bgray.hearing import level_of

    levels = {name: level_of(s, RATE) for name, s in heard(client, question).items()}
    assert levels["a"].lufs == pytest.approx(levels["b"].lufs, abs=0.01)
    assert max(level.peak for level in levels.values()) <= 1 + 1e-6


def test_a_variant_can_be_tested_against_the_target(client, made):
    asked = abx(made, lanes=["target", made.runs[0].id])
    question = post(client, "/blind", asked).get_json()
    sounds = heard(client, question)
    assert (pitch(sounds["a"]), pitch(sounds["b"])) == (200, 300)
    post(client, f"/blind/{question['session']}", {"number": 1, "answer": "a"})
    assert [lane["variant"] for lane in written(made)[0]["lanes"]] == ["target", "one"]


def test_ranking_unshuffles_what_was_shown_and_keeps_the_scores(client, made):
    question = post(client, "/blind", ranking(made)).get_json()
    for number in (1, 2):
        sounds = heard(client, question)
        assert pitch(sounds.pop("reference")) == 200
        assert sorted(map(pitch, sounds.values())) == [300, 400, 500]
        # Ears like high notes: 500 Hz first, and 300 and 400 share a place.
        places = [1 if pitch(sounds[name]) == 500 else 2 for name in sorted(sounds)]
        question = post(
            client, f"/blind/{question['session']}", {"number": number, "answer": places}
        ).get_json()
    assert [row["label"] for row in question["rows"]] == [
        "variant three", "variant one", "variant two",
    ]  # fmt: skip
    (file,) = written(made)
    assert [answer["ranks"] for answer in file["answers"]] == [[2, 2, 1]] * 2
    assert [answer["item"] for answer in file["answers"]] == [0, 4]
    assert file["answers"][1]["scores"]["val_si_sdr"] == [10, 9, 8]
    found = results_of(made.url)
    assert [one.variant for one in found.ranked][0] == "three"
    assert [one.mean_rank for one in found.ranked] == [1, 2.5, 2.5]
    assert [one.place for one in found.ranked] == [0, 0.75, 0.75]
    first, second = found.agreements
    # The third variant is worst by both scores, and was liked best.
    assert (first.metric, first.rounds, second.metric, second.rounds) == (
        "val_stft", 2, "val_si_sdr", 1,
    )  # fmt: skip
    assert first.rho == pytest.approx(-math.sqrt(3) / 2)
    assert first.interval is None


def test_the_scores_of_a_ranking_are_those_of_the_step_that_was_heard(client, made):
    for run in made.runs:
        run.scores = {50: {"val_stft": [0.25] * 5}, 100: {"val_stft": [0.75] * 5}}
    question = post(client, "/blind", ranking(made, step=50, items=[4])).get_json()
    body = {"number": 1, "answer": [1, 2, 3]}
    post(client, f"/blind/{question['session']}", body)
    assert written(made)[0]["answers"][0]["scores"] == {"val_stft": [0.25] * 3}


def test_every_order_of_a_ranking_is_equally_likely(made):
    test = blind.begin(made, ranking(made, items=[0]))
    counts = {}
    for _ in range(600):
        test.number = 0
        test.ask()
        order = tuple(test.hidden["order"])
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    chi = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert chi < 30  # 5 degrees of freedom: 1 in 70,000


def test_x_is_drawn_evenly_and_anew(made):
    test = blind.begin(made, abx(made, trials=100))
    drawn = []
    for _ in range(100):
        test.ask()
        drawn.append(test.hidden["x"])
    assert 25 <= drawn.count("a") <= 75  # 1 in two million
    assert 25 <= sum(a == b for a, b in zip(drawn, drawn[1:], strict=False)) <= 75


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lanes": ["a" * 12, "nobody"]}, "no such run"),
        ({"lanes": ["aaaaaaaaaa00", "aaaaaaaaaa00"]}, "two different ones"),
        ({"lanes": "both"}, "ids of runs"),
        ({"trials": 4}, "5 to 100, got 4"),
        ({"trials": True}, "5 to 100"),
        ({"step": 60}, "no clip 000 at step 60"),
        ({"step": "100"}, "step: a number"),
        ({"item": None}, "numbers of clips"),
        ({"kind": "guess"}, "'abx' or 'ranking'"),
        ({"who": 3}, "who: text"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_words(client, made, change, words):
    answer = post(client, "/blind", abx(made) | change)
    assert answer.status_code == 400
    assert words in answer.get_json()["error"]


def test_an_answer_counts_once_and_only_to_its_own_question(client, made):
    question = post(client, "/blind", abx(made)).get_json()
    path = f"/blind/{question['session']}"
    for body in ({"number": 2, "answer": "a"}, {"number": 1, "answer": "x"}, {"number": 1}):
        assert post(client, path, body).status_code == 400
    assert not written(made)
    assert post(client, path, {"number": 1, "answer": "a"}).status_code == 200
    assert post(client, path, {"number": 1, "answer": "b"}).status_code == 400
    assert post(client, path, {"number": True, "answer": "b"}).status_code == 400
    assert len(written(made)[0]["answers"]) == 1
    assert post(client, "/blind/unknown", {"number": 1, "answer": "a"}).status_code == 404


def test_an_answer_whose_reply_was_lost_can_be_sent_again(client, made):
    question = post(client, "/blind", abx(made, trials=5)).get_json()
    path = f"/blind/{question['session']}"
    for number in range(1, 6):
        body = {"number": number, "answer": "ab"[number % 2]}
        first = post(client, path, body).get_json()
        assert post(client, path, body).get_json() == first
        assert len(written(made)[0]["answers"]) == number
    assert first["done"]
    assert first["trials"] == 5


@pytest.mark.parametrize("error", [OSError("S3 is away"), ValueError("a damaged clip")])
def test_a_question_that_cannot_be_made_does_not_end_the_test(client, made, monkeypatch, error):
    question = post(client, "/blind", abx(made)).get_json()
    path, body = f"/blind/{question['session']}", {"number": 1, "answer": "a"}

    def fail(one):
        raise error

    monkeypatch.setattr(blind, "samples", fail)
    for _ in range(2):
        answer = post(client, path, body)
        assert answer.status_code in (502, 503)
        assert str(error) in answer.get_json()["error"]
    assert post(client, path, {"number": 2, "answer": "a"}).status_code == 400  # unheard
    monkeypatch.undo()
    assert post(client, path, body).get_json()["number"] == 2
    assert len(written(made)[0]["answers"]) == 1


def test_tests_that_were_left_give_their_sounds_back_and_make_them_anew(client, made, monkeypatch):
    monkeypatch.setattr(listening, "MOST_SOUND", 1)
    tests, begin = [], blind.begin
    monkeypatch.setattr(blind, "begin", lambda *a: tests.append(begin(*a)) or tests[-1])
    questions = [post(client, "/blind", ranking(made)).get_json() for _ in range(3)]
    assert [test.held > 0 for test in tests] == [False, False, True]
    before = heard(client, questions[2])
    again = heard(client, questions[0])
    assert [test.held > 0 for test in tests] == [True, False, False]
    assert {pitch(s) for s in again.values()} == {pitch(s) for s in before.values()}
    # In the order that this question had: its answer must still fit.
    order = sorted(name for name in again if name != "reference")
    assert [pitch(again[name]) for name in order] == [
        300 + 100 * lane for lane in tests[0].hidden["order"]
    ]


def test_an_answer_to_a_sweep_that_was_deleted_does_not_make_its_folder_anew(client, made):
    question = post(client, "/blind", abx(made)).get_json()
    shutil.rmtree(made.url)
    answer = post(client, f"/blind/{question['session']}", {"number": 1, "answer": "a"})
    assert answer.status_code == 502
    assert "not there any more" in answer.get_json()["error"]
    assert not Path(made.url).exists()


def test_a_damaged_sweep_is_an_error_in_words(made):
    server = app(made)

    def damaged(name):
        raise ConfigError("sweep.json", [("", "is damaged")])

    other = type(server)("other")
    listening.routes(other, damaged)
    for path in ("/lanes", "/heard", "/file/a/000-target.wav"):
        answer = other.test_client().get(f"{PREFIX}{path}", query_string={"sweep": "s"})
        assert answer.status_code == 502
        assert "is damaged" in answer.get_json()["error"]
    assert post(other.test_client(), "/blind", abx(made)).status_code == 502


def test_an_answer_that_could_not_be_written_can_be_given_again(client, made, monkeypatch):
    question = post(client, "/blind", abx(made)).get_json()

    def full(url, data):
        raise OSError(28, "No space left on device", url)

    monkeypatch.setattr(storage, "write_bytes", full)
    body = {"number": 1, "answer": "a"}
    answer = post(client, f"/blind/{question['session']}", body)
    assert answer.status_code == 502
    assert "No space left" in answer.get_json()["error"]
    monkeypatch.undo()
    assert post(client, f"/blind/{question['session']}", body).get_json()["number"] == 2
    assert len(written(made)[0]["answers"]) == 1


def test_places_outside_the_lanes_are_refused(client, made):
    question = post(client, "/blind", ranking(made)).get_json()
    for given in ([1, 2], [0, 1, 2], [1, 2, 4], [1, 2, True], [1, 2, 1.5], "123", None):
        body = {"number": 1, "answer": given}
        assert post(client, f"/blind/{question['session']}", body).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"},
        {"X-Nothing": "at all"},
        {"Origin": "http://localhost:1"},
    ],
)
def test_another_sites_page_cannot_answer(client, made, headers):
    assert post(client, "/blind", abx(made), **headers).status_code == 403


def test_only_small_json_is_taken(client, made):
    address = f"{PREFIX}/blind"
    form = client.post(address, data="a=1", headers=HERE, content_type="text/plain")
    assert form.status_code == 415
    assert post(client, "/blind", {"who": "x" * 20000}).status_code == 413
    assert (
        client.post(address, data="[1]", headers=HERE, content_type="application/json").status_code
        == 400
    )  # noqa: E501
    assert (
        client.post(address, data="{", headers=HERE, content_type="application/json").status_code
        == 400
    )  # noqa: E501


# --- storage


def test_clips_are_heard_and_answers_kept_on_s3(s3, tmp_path):
    local = sweep(tmp_path / "sweep", seeds=(0,), steps=(100,), items=(0,))
    made = type(local)(f"{s3}/sweep", [])
    for run in local.runs:
        url = f"{made.url}/{run.id}"
        for name in run.clips:
            data = Path(run.url, "clips", name).read_bytes()
            storage.write_bytes(f"{url}/clips/{name}", data)
        made.runs.append(Trial(run.id, url, run.variant, run.label, 0, run.scores, run.clips))
    client = app(made).test_client()
    found = lanes(client, made)["lanes"]
    assert found[2]["lufs"] is not None
    assert (
        client.get(found[2]["url"]).data
        == Path(local.runs[0].url, "clips", "000-step-000100.wav").read_bytes()
    )  # noqa: E501
    question = post(client, "/blind", abx(made)).get_json()
    answer = post(client, f"/blind/{question['session']}", {"number": 1, "answer": "a"})
    assert answer.status_code == 200
    assert results_of(made.url).pairs[0].running == 1
    # An address that changed without its clip would make the page load and play anew.
    assert [lane["url"] for lane in lanes(client, made)["lanes"]] == [lane["url"] for lane in found]
    storage.write_bytes(f"{made.url}/gone", b"")
    for url in [f"{made.url}/{name}" for name in storage.stamps(made.url)]:
        storage.remove(url)
    answer = post(client, f"/blind/{question['session']}", {"number": 2, "answer": "a"})
    assert answer.status_code == 502
    assert storage.listdir(made.url) == []
