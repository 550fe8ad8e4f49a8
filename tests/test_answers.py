import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from bgray import answers, storage
from bgray.answers import results_of

LANE = {"variant": "v", "label": "V", "run": "r", "seed": 0}
LANES = [LANE, {**LANE, "variant": "w", "label": "W"}]


def ago(hours):
    return (datetime.now(UTC) - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def session(folder, name, right=(True, False), **changes):
    """One ABX test's file, whole; `right` may hold when an answer was given instead."""
    whole = {"kind": "abx", "lanes": LANES, "trials": len(right), "complete": True}
    whole |= {"answers": [{"right": one} for one in right], **changes}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(whole))


def ranking(folder, name, ranks, scores=None, *, step=100, source=None, variants="vw"):
    lanes = [{**LANE, "variant": v, "label": v.upper()} for v in variants]
    answer = {"ranks": ranks, "scores": scores or {}}
    whole = {"kind": "ranking", "lanes": lanes, "complete": True, "answers": [answer]}
    whole |= {"step": step, "source": source, "metric": "val_si_sdr"}
    whole |= {"modes": dict.fromkeys(scores or {}, "max")}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(whole))


def test_two_sessions_of_one_second_do_not_overwrite_each_other(tmp_path):
    lane = {"variant": "v", "label": "v", "run": "r", "seed": 0}
    for _ in range(2):
        record = answers.Record(
            str(tmp_path), "abx", [lane, lane], {"trials": 1}, started="2026-01-01T00:00:00Z"
        )
        record.add({"x": "a", "answer": "a", "right": True}, complete=True)
    assert len(list((tmp_path / "listening").iterdir())) == 2


def test_damaged_files_are_named_and_skipped(tmp_path):
    folder = tmp_path / "listening"
    session(folder, "good")
    session(folder, "kind", kind="guess")
    session(folder, "short", answers=[{"right": True}])
    session(folder, "words", answers=[{"right": "yes"}] * 2)
    session(folder, "ranks", kind="ranking", answers=[{"ranks": [1, float("nan")]}])
    session(folder, "lanes", lanes=None)
    (folder / "half.json").write_text('{"kind": "ab')
    (folder / "list.json").write_text("[]")
    (folder / "notes.txt").write_text("not one of ours")
    found = results_of(str(tmp_path))
    assert (found.sessions, found.pairs[0].right, found.pairs[0].trials) == (1, 1, 2)
    assert [line.split(":")[0] for line in found.damaged] == [
        f"{name}.json" for name in ("half", "kind", "lanes", "list", "ranks", "short", "words")
    ]


def test_a_test_that_was_broken_off_does_not_count(tmp_path):
    folder = tmp_path / "listening"
    given = [{"right": True, "when": ago(2)}] * 5
    session(folder, "a", complete=False, trials=16, answers=given)
    session(folder, "b", complete=False, trials=16, answers=[{"right": True}])
    (pair,) = results_of(str(tmp_path)).pairs
    assert (pair.trials, pair.p_value, pair.broken_off, pair.running) == (0, None, 2, 0)
    assert pair.text == "V and W: 2 broken off"


def test_a_test_that_goes_on_is_not_broken_off(tmp_path):
    folder = tmp_path / "listening"
    given = [{"right": True, "when": ago(2)}, {"right": True, "when": ago(0.2)}]
    session(folder, "a", complete=False, trials=16, answers=given)
    (pair,) = results_of(str(tmp_path)).pairs
    assert (pair.trials, pair.broken_off, pair.running) == (0, 0, 1)
    assert pair.text.endswith("1 still running")


def test_each_session_has_its_own_p_and_all_of_them_one_only_if_so_many_were_planned(tmp_path):
    folder = tmp_path / "listening"
    session(folder, "a", [True] * 5 + [False], step=100, source=None, item=0)
    (one,) = results_of(str(tmp_path)).pairs
    assert one.p_value == pytest.approx(7 / 64)
    assert one.pooled_p is None
    assert one.text == "V and W at step 100: 5 of 6 right, p = 0.11; clip 000"
    session(folder, "b", [True] * 6, step=100, source=None, item=4)
    (two,) = results_of(str(tmp_path)).pairs
    assert two.p_value is None
    assert two.pooled_p == pytest.approx(13 / 4096)
    assert two.text == (
        "V and W at step 100: 5 of 6 right, p = 0.11; 6 of 6 right, p = 0.016; over all 2 sessions "
        "11 of 12, p = 0.0032 if their number was fixed beforehand; clips 000, 004"
    )


def test_abx_of_another_step_or_source_is_not_added_up(tmp_path):
    folder = tmp_path / "listening"
    session(folder, "a", [True] * 5, step=100, source="bass")
    session(folder, "b", [False] * 5, step=200, source="bass")
    session(folder, "c", [True] * 6, step=100, source="vocals")
    session(folder, "d", [True], step=300, source="vocals", complete=False, trials=9)
    bass, vocals = results_of(str(tmp_path)).pairs
    assert (bass.source, bass.step, bass.right, bass.trials) == ("bass", 200, 0, 5)
    assert bass.text.startswith("V and W bass at step 200 (not counted: step 100): 0 of 5 right")
    # A test that was only begun does not hide one that went to its end.
    assert (vocals.source, vocals.step, vocals.right, vocals.trials) == ("vocals", 100, 6, 6)


def test_rankings_of_the_last_step_count_and_each_source_by_itself(tmp_path):
    folder = tmp_path / "listening"
    ranking(folder, "a", [1, 2], step=50, source="bass")
    ranking(folder, "b", [2, 1], step=100, source="bass")
    ranking(folder, "c", [1, 2], step=50, source="vocals")
    found = results_of(str(tmp_path)).ranked
    assert [(one.source, one.step, one.variant, one.mean_rank) for one in found] == [
        ("bass", 100, "w", 1),
        ("bass", 100, "v", 2),
        ("vocals", 50, "v", 1),
        ("vocals", 50, "w", 2),
    ]
    assert found[0].where == "bass at step 100 (not counted: step 50)"


def test_ears_on_one_source_are_held_against_its_own_score(tmp_path):
    folder = tmp_path / "listening"
    scores = {
        "val_si_sdr": [1, 2],
        "val_si_sdr_bass": [2, 1],
        "val_si_sdr_double_bass": [1, 2],
        "val_stft": [1, 2],
    }
    ranking(folder, "a", [1, 2], scores, source="bass")
    (one,) = results_of(str(tmp_path)).agreements
    assert (one.metric, one.rho) == ("val_si_sdr_bass", pytest.approx(1))
    assert "bass at step 100" in one.text
    ranking(folder, "b", [1, 2], scores, source=None)
    assert [found.metric for found in results_of(str(tmp_path)).agreements] == [
        "val_si_sdr", "val_si_sdr_bass", "val_si_sdr_double_bass", "val_stft", "val_si_sdr_bass",
    ]  # fmt: skip


def test_rounds_of_the_same_variants_do_not_prove_more_by_being_many(tmp_path):
    folder = tmp_path / "listening"
    for n in range(12):
        ranking(folder, str(n), [1, 2, 3], {"val_si_sdr": [3, 2, 1]}, variants="uvw")
    (one,) = results_of(str(tmp_path)).agreements
    assert (one.rho, one.rounds) == (pytest.approx(1), 12)
    assert "can't tell" in one.text


def test_only_files_that_have_changed_are_read_again(tmp_path, monkeypatch):
    folder = tmp_path / "listening"
    for name in "abc":
        session(folder, name)
    (folder / "half.json").write_text("{")
    before, read = results_of(str(tmp_path)), []
    plain = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda url: read.append(url) or plain(url))
    assert results_of(str(tmp_path)) == before
    assert read == []
    session(folder, "b", [True] * 4)
    os.unlink(folder / "c.json")
    after = results_of(str(tmp_path))
    assert [url.rsplit("/", 1)[-1] for url in read] == ["b.json"]
    assert (after.sessions, after.pairs[0].right, after.pairs[0].trials) == (2, 5, 6)
    assert after.damaged == before.damaged


def test_a_pair_is_one_pair_whichever_was_a(tmp_path):
    folder = tmp_path / "listening"
    session(folder, "a")
    session(folder, "b", lanes=json.loads((folder / "a.json").read_text())["lanes"][::-1])
    (pair,) = results_of(str(tmp_path)).pairs
    assert (pair.labels, pair.right, pair.trials, pair.sessions) == (("V", "W"), 2, 4, 2)


def test_a_sweep_nobody_listened_to_has_empty_results(tmp_path):
    assert results_of(str(tmp_path)) == answers.Heard()
