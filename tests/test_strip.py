"""The strip in a real browser when things go wrong or change under it: clips, steps, replies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import until
from listening_page import RATE, TAP, opened, put, serving, state, tone


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def page(browser, served):
    with opened(browser, served[1]) as tab:
        yield tab


def show(page, *variants):
    lanes = [{"variant": variant, "label": variant, "colour": "#000"} for variant in variants]
    page.evaluate("(lanes) => bgrayListening.show({sweep: strip.wanted.sweep, lanes})", lanes)


# --- what is played


def tapped(page):
    """What has left the graph since TAP, (T,); zeros where nothing was connected."""
    blocks = page.evaluate("tapped.map(([frame, data]) => [frame, Array.from(data)])")
    got = np.zeros(blocks[-1][0] + 128 - blocks[0][0], np.float32)
    for frame, data in blocks:
        got[frame - blocks[0][0] :][:128] = data
    return got


@pytest.fixture
def constant(browser, served):
    """The page, with 0.25 in every sample of all that the variants can play."""
    for run in served[0].runs:
        put(run, "000-step-000100.wav", np.full(2 * RATE, 0.25))
        put(run, "000-target.wav", tone(200, 2))
        put(run, "000-input.wav", tone(250, 2))
    with opened(browser, served[1]) as tab:
        tab.get_by_role("button", name="Match loudness").click()
        tab.evaluate("document.activeElement.blur()")
        tab.keyboard.press("1")
        yield tab


@pytest.mark.alone  # what Chromium renders in time depends on the machine
def test_a_seek_leaves_one_voice_and_no_click(constant):
    constant.evaluate(TAP)
    constant.wait_for_function("tapped.length > 40")
    for to in (1.0, 0.5, 1.5):
        seek = "(to) => { strip.player.seek(to); strip.player.voices.all.connect(tap); }"
        constant.evaluate(seek, to)
        constant.evaluate("window.now = tapped.length")
        constant.wait_for_function("tapped.length > now + 30")
    blocks = constant.evaluate("tapped.map(([frame, data]) => Array.from(data))")
    heard = np.concatenate(blocks)  # without blocks that a busy machine did not tap
    heard = heard[np.flatnonzero(heard)[0] :]
    assert len(heard) > 100 * 128
    # Two voices would be 0.5; the old one's line down and the new one's up add up to one.
    assert heard == pytest.approx(np.full(len(heard), 0.25), abs=1e-3)


@pytest.mark.alone
def test_a_stop_fades_and_leaves_the_audio_context_asleep(constant):
    constant.evaluate(TAP)
    constant.wait_for_function("tapped.length > 40")
    constant.keyboard.press(" ")
    constant.wait_for_function("strip.player.context.state === 'suspended'")
    got = tapped(constant)
    last = int(np.flatnonzero(got)[-1])
    assert got[-1] == 0
    down = np.diff(got[last - 60 : last + 2])
    assert (down < 0).all()
    assert np.abs(down).max() < 0.25 / 60  # in 5 ms, 80 samples
    constant.keyboard.press(" ")
    constant.wait_for_function("strip.player.context.state === 'running'")
    constant.wait_for_timeout(300)  # longer than it takes to fall asleep
    assert constant.evaluate("strip.player.context.state") == "running"


def test_other_clips_play_on_from_the_same_place(browser, served):
    for run in served[0].runs:  # long enough for a busy machine
        for name in ("step-000050", "step-000100", "target", "input"):
            put(run, f"000-{name}.wav", tone(300, 30))
    with opened(browser, served[1]) as page:
        page.keyboard.press("l")
        page.keyboard.press(" ")
        page.wait_for_function("strip.player.position() > 0.3")
        page.keyboard.press(" ")
        at = state(page)["at"]
        page.get_by_label("Step").select_option("50")
        page.wait_for_function("strip.data.step === 50")
        assert state(page)["at"] == pytest.approx(at, abs=1e-6)
        page.keyboard.press("Home")
        page.keyboard.press(" ")
        page.wait_for_function("strip.player.position() > 0.2")
        page.get_by_label("Step").select_option("100")
        page.wait_for_function("strip.data.step === 100")
        assert page.evaluate("strip.player.voices.offset") > 0.2


def test_loop_on_or_off_while_it_plays_loses_no_time(page):
    page.keyboard.press(" ")
    page.wait_for_function("strip.player.position() > 0.1")
    jump = """() => {
        const before = strip.player.voices;
        strip.setLoop(!strip.player.loop);
        const now = strip.player.voices;
        return now.offset - before.position(now.when);
    }"""
    for _ in range(2):
        assert page.evaluate(jump) == pytest.approx(0, abs=1e-4)


@pytest.mark.alone
def test_without_loop_all_lanes_end_with_the_shortest_and_stop_when_told(browser, served):
    for run in served[0].runs:
        put(run, "000-target.wav", tone(200, 0.4))
    with opened(browser, served[1]) as page:
        page.keyboard.press("l")
        page.keyboard.press("1")
        page.evaluate(TAP)
        page.wait_for_function("tapped.length > 20 && !strip.player.playing")
        page.wait_for_timeout(200)
        got = tapped(page)
        length = np.flatnonzero(got)[-1] - np.flatnonzero(got)[0]
        assert length / RATE == pytest.approx(0.4, abs=0.002)


def test_a_clip_that_was_written_anew_is_loaded_anew(page, served):
    run = next(run for run in served[0].runs if run.variant == "two" and run.seed == 0)
    held = put(run, "000-step-000100.wav", tone(3000, 1, 0.01))[0]
    page.evaluate("bgrayListening.refresh()")
    page.wait_for_function("strip.cards[3].buffer.getChannelData(0).every((x) => x < 0.02)")
    got = page.evaluate("Array.from(strip.cards[3].buffer.getChannelData(0))")
    assert np.array_equal(np.array(got, np.float32), held)
    assert page.evaluate("strip.player.buffers[3] === strip.cards[3].buffer")


def test_a_drag_over_a_lane_that_goes_ends_with_it(page):
    box = page.locator(".bl-plot").nth(2).bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 40)
    assert page.evaluate("strip.drag !== null")
    page.evaluate("strip.choose('item', '4')")
    page.wait_for_function("strip.data.item === 4")
    page.mouse.move(box["x"] + 170, box["y"] + 40)
    page.mouse.up()
    assert page.evaluate("strip.drag") is None
    assert state(page)["region"] is None


# --- what is said and chosen


def test_the_note_follows_what_is_missing_and_what_came_back(page):
    show(page, "one", "two", "three", "ghost")
    note = page.locator(".bl-note")
    assert "Not here: ghost (no clips yet)" in note.inner_text()
    page.route("**/lanes?*", lambda route: route.abort())
    page.evaluate("bgrayListening.refresh()")
    assert "cannot be had" in note.inner_text()
    page.unroute("**/lanes?*")
    page.evaluate("bgrayListening.refresh()")
    assert "cannot be had" not in note.inner_text()
    assert "Every lane plays at" in note.inner_text()


def test_the_note_names_the_lane_that_makes_all_quieter(page, served):
    run = next(run for run in served[0].runs if run.variant == "three" and run.seed == 0)
    put(run, "000-step-000100.wav", np.where(np.arange(RATE) % 4000, 0.0, 0.9))
    page.evaluate("bgrayListening.refresh()")
    page.get_by_text("so that variant three does not clip").wait_for()


def test_a_refresh_does_not_undo_a_choice_that_is_on_its_way(page):
    held, hold = [], True
    page.route("**/lanes?*", lambda route: held.append(route) if hold else route.continue_())
    page.get_by_label("Step").select_option("50")
    until(page, lambda: len(held) == 1)
    page.evaluate("void bgrayListening.refresh()")
    until(page, lambda: len(held) == 2)
    hold = False
    for route in held:
        route.continue_()
    page.wait_for_function("!strip.pending")
    assert page.evaluate("strip.data.step") == 50


def test_another_sweep_begins_at_its_own_last_step_also_when_a_refresh_comes_first(page):
    held = []
    page.route("**/lanes?*", lambda route: held.append(route.request.url))
    page.evaluate("void bgrayListening.show({sweep: 'other', lanes: strip.wanted.lanes})")
    page.evaluate("void bgrayListening.refresh()")
    until(page, lambda: len(held) == 2)
    assert all("sweep=other" in url and "step=" not in url for url in held)


def test_a_refresh_leaves_the_options_of_an_open_list_alone(page, served):
    page.evaluate("window.before = strip.selects.step.made.options[0]")
    page.evaluate("bgrayListening.refresh()")
    assert page.evaluate("strip.selects.step.made.options[0] === before")
    for run in served[0].runs:
        put(run, "000-step-000150.wav", tone(100))
    page.evaluate("bgrayListening.refresh()")
    page.wait_for_function("strip.selects.step.made.options.length === 3")
    assert page.get_by_label("Step").input_value() == "100"


def test_borders_of_what_can_be_used_stand_out(page):
    """At least 3:1 against the paper (WCAG 2.2, 1.4.11)."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("#strip select, #strip .bl-group button")]
            .map((one) => {
                const canvas = new OffscreenCanvas(1, 1).getContext("2d");
                canvas.fillStyle = getComputedStyle(one).borderTopColor;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            })"""
    )
    share = np.array(found) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert len(found) > 8
    assert (1.05 / (luminance + 0.05)).min() >= 3


# --- blind tests


def begin(page, kind="ABX test", trials="5"):
    page.get_by_role("button", name=kind).click()
    if trials and kind == "ABX test":
        page.get_by_label("Trials").fill(trials)
    page.get_by_role("button", name="Begin").click()
    page.wait_for_function("bgrayListening.test.question?.number === 1")


def answers(made):
    (file,) = Path(made.url).glob("listening/*.json")
    return json.loads(file.read_text())["answers"]


def number(page, n):
    page.wait_for_function(f"bgrayListening.test.question?.number === {n}")


def test_a_question_whose_sounds_failed_is_loaded_again(page, served):
    begin(page)
    page.route("**/blind/*/*", lambda route: route.abort())
    page.keyboard.press("x")
    page.keyboard.press("1")
    page.get_by_text("The sounds cannot be had").wait_for()
    page.unroute("**/blind/*/*")
    page.get_by_role("button", name="Try again").click()
    number(page, 2)
    assert len(answers(served[0])) == 1
    page.route("**/blind/*/*", lambda route: route.abort())
    page.keyboard.press("x")
    page.keyboard.press("2")
    page.get_by_text("The sounds cannot be had").wait_for()
    page.unroute("**/blind/*/*")
    page.keyboard.press("1")  # an answer's key as well, and it answers nothing
    number(page, 3)
    assert [one["answer"] for one in answers(served[0])] == ["a", "b"]


def test_an_answer_whose_reply_was_lost_is_sent_again_as_it_was(page, served):
    begin(page)

    def lose(route):
        route.fetch()  # the server has it
        route.abort()

    for n in range(1, 6):
        page.route("**/blind/*", lose)
        page.keyboard.press("x")
        page.keyboard.press("1")
        page.get_by_text("Your answer is not lost").wait_for()
        page.unroute("**/blind/*")
        page.keyboard.press("2")  # too late to answer otherwise
        if n < 5:
            number(page, n + 1)
    page.locator(".bl-result").wait_for()
    assert [one["answer"] for one in answers(served[0])] == ["a"] * 5


def test_a_wrong_number_of_trials_is_no_lost_answer(page):
    page.get_by_role("button", name="ABX test").click()
    page.get_by_label("Trials").fill("3")
    page.get_by_role("button", name="Begin").click()
    error = page.locator(".bl-error")
    error.wait_for()
    assert error.inner_text() == "trials: 5 to 100, got 3."
    page.get_by_label("Trials").fill("5")
    page.get_by_role("button", name="Begin").click()
    number(page, 1)


def test_a_sweep_that_is_gone_says_so(page, served):
    begin(page)
    shutil.rmtree(Path(served[0].url))
    page.keyboard.press("x")
    page.keyboard.press("1")
    page.get_by_text("not there any more").wait_for()
    assert not Path(served[0].url).exists()


def test_esc_again_and_again_does_not_close_a_running_test(page):
    begin(page)
    page.keyboard.press("x")
    for _ in range(4):
        page.keyboard.press("Escape")
        page.wait_for_timeout(30)
        assert page.locator("dialog").is_visible()
        assert page.get_by_role("alertdialog").is_visible()
    page.get_by_role("button", name="Go on").click()
    page.evaluate("bgrayListening.test.dialog.close()")  # as a browser may
    page.get_by_role("alertdialog").wait_for()
    assert page.evaluate("bgrayListening.test.dialog.matches(':modal')")
    page.get_by_role("button", name="Break off").last.click()
    assert page.locator("dialog").count() == 0
    page.get_by_role("button", name="ABX test").click()
    page.keyboard.press("Escape")
    assert page.locator("dialog").count() == 0
    page.keyboard.press("2")
    assert state(page)["heard"] == "variant two"


def test_a_ranking_is_saved_only_once_every_lane_was_heard(page):
    begin(page, "Blind ranking")
    save = page.get_by_role("button", name="Save, next clip")
    for name in "ABC":
        page.get_by_label(f"{name} comes 1").click()
    assert save.is_disabled()
    for name in "abc":
        assert save.is_disabled()
        page.keyboard.press(name)
    assert save.is_enabled()
