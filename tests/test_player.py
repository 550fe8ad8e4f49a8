"""The strip in a real browser: what is rendered, what is served, what keys do."""

import math
from pathlib import Path

import numpy as np
import pytest
from listening_page import (
    ASSETS,
    RATE,
    SCRIPTS,
    TAP,
    opened,
    put,
    samples,
    serving,
    state,
    tone,
)

FADE = 0.005


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def page(browser, served):
    with opened(browser, served[1]) as tab:
        yield tab


@pytest.fixture(scope="module")
def scripts(browser):
    """An empty page with the strip's scripts, for what needs no clips."""
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    for name in SCRIPTS:
        tab.add_script_tag(path=ASSETS / f"{name}.js")
    yield tab
    tab.close()


RENDER = """async (wanted) => {
    const strip = window.strip;
    const urls = strip.cards.filter(({kind}) => kind === "lane").map(({url}) => url);
    const [first] = await bgrayListening.render({urls, ...wanted});
    return Array.from(first);
}"""


def render(page, **wanted):
    return np.array(page.evaluate(RENDER, wanted), np.float32)


# --- samples


def test_outside_the_crossfade_every_sample_is_one_lanes(page, served):
    one, two, three = (samples(served[0], f"variant {v}") for v in ("one", "two", "three"))
    got = render(page, switches=[[0.3, 1], [0.7, 2]], seconds=1)
    assert len(got) == RATE
    fade = round(FADE * RATE) + 2
    assert np.array_equal(got[:4800], one[:4800])
    assert np.array_equal(got[4800 + fade : 11200], two[4800 + fade : 11200])
    assert np.array_equal(got[11200 + fade :], three[11200 + fade :])
    # In between the gains add up to one: a straight line from one lane's sample to the other's.
    n = np.arange(4800, 4800 + fade - 2)
    share = (n - 4800) / (FADE * RATE)
    assert got[n] == pytest.approx((1 - share) * one[n] + share * two[n], abs=1e-3)


def test_a_switch_makes_no_gap_and_no_click(page, served):
    """Lanes with the same constant: whatever happens to their gains, it must stay there."""
    for run in served[0].runs:
        put(run, "000-step-000100.wav", np.full(RATE, 0.25))
    switches = [[0.1, 1], [0.102, 2], [0.104, 0], [0.5, 2]]  # also while one is going on
    got = render(page, switches=switches, seconds=1)
    assert got == pytest.approx(np.full(RATE, 0.25), abs=1e-6)


def test_loudness_gains_are_applied_to_each_lane(page, served):
    one, two = (samples(served[0], f"variant {v}") for v in ("one", "two"))
    got = render(page, gains=[0.5, 1.75, 1], switches=[[0.5, 1]], seconds=1)
    assert np.array_equal(got[:8000], one[:8000] * np.float32(0.5))
    assert np.array_equal(got[8100:], two[8100:] * np.float32(1.75))


def test_a_loop_repeats_its_region_to_the_sample_in_every_lane(page, served):
    one, two = (samples(served[0], f"variant {v}") for v in ("one", "two"))
    loop = [0.25, 0.5]  # 4000 samples from 4000
    got = render(page, loop=loop, switches=[[0.625, 1]], seconds=1)
    part = slice(4000, 8000)
    assert np.array_equal(got[:10000], np.tile(one[part], 3)[:10000])
    assert np.array_equal(got[10100:], np.tile(two[part], 4)[10100:16000])
    inside = render(page, loop=loop, offset=0.3, seconds=0.25)
    assert np.array_equal(inside, np.concatenate([one[4800:8000], one[4000:4800]]))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT"])
def test_every_kind_of_wav_file_decodes_to_its_samples(scripts, subtype):
    import io

    import soundfile

    audio = np.random.default_rng(0).uniform(-1, 1, (500, 2)).astype(np.float32)
    audio[:2] = [[-1, 1], [0, 1 - 2**-15]]
    for form in ("WAV", "WAVEX"):
        file = io.BytesIO()
        soundfile.write(file, audio, 44100, format=form, subtype=subtype)
        expected = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]
        got = scripts.evaluate(
            """(bytes) => { const b = bgrayListening.decode(Uint8Array.from(bytes).buffer);
                return [b.sampleRate, ...[0, 1].map((c) => Array.from(b.getChannelData(c)))]; }""",
            list(file.getvalue()),
        )
        assert got[0] == 44100
        assert np.array_equal(np.array(got[1:], np.float32).T, expected)


def test_both_channels_of_a_stereo_clip_are_kept(page, served):
    made = served[0]
    both = np.random.default_rng(5).uniform(-0.5, 0.5, (2, RATE))
    held = put(made.runs[0], "000-step-000050.wav", both)
    got = page.evaluate(
        """async (run) => (await bgrayListening.render({seconds: 0.5, urls: [
            `/api/listening/file/${run}/000-step-000050.wav?sweep=` +
            encodeURIComponent(strip.wanted.sweep)]})).map((c) => Array.from(c))""",
        made.runs[0].id,
    )
    assert np.array_equal(np.array(got, np.float32), held[:, :8000])


# --- keys


def test_keys_switch_what_is_heard_and_only_the_chosen_clips_were_served(page, served):
    made, _, log = served
    files = {path.split("?")[0].rsplit("/file/")[1] for path in log if "/file/" in path}
    ids = [run.id for run in made.runs if run.seed == 0]
    wanted = {f"{id}/000-step-000100.wav" for id in ids}
    assert files == wanted | {f"{ids[0]}/000-{kind}.wav" for kind in ("target", "input")}
    page.keyboard.press(" ")
    keys = {
        "1": "variant one",
        "3": "variant three",
        "t": "target",
        "2": "variant two",
        "i": "input",
    }  # noqa: E501
    order = ["target", "input", "variant one", "variant two", "variant three"]
    for key, label in keys.items():
        page.keyboard.press(key)
        now = state(page)
        assert (now["heard"], now["pressed"]) == (label, [label])
        assert now["open"] == [int(one == label) for one in order]
    page.keyboard.press("9")
    assert state(page)["heard"] == "input"
    page.keyboard.press(" ")
    assert not state(page)["playing"]


@pytest.mark.alone  # what Chromium renders in time depends on the machine
def test_keys_switch_what_is_played_without_gap_and_without_losing_the_beat(page, served):
    """Of the page's own AudioContext: before the key one lane's samples, after it the other's, on
    one clock."""
    made = served[0]
    page.keyboard.press("1")
    page.evaluate(TAP)
    page.wait_for_function("tapped.length > 40")
    page.keyboard.press("2")
    page.wait_for_function("((n) => n.length > 160)(tapped)")
    blocks = page.evaluate("tapped.map(([frame, data]) => [frame, Array.from(data)])")
    got = np.zeros(blocks[-1][0] + 128 - blocks[0][0], np.float32)
    for frame, data in blocks:  # none comes while nothing is connected, before the start
        got[frame - blocks[0][0] :][:128] = data
    gains = {lane["label"]: lane["gain_db"] for lane in page.evaluate("strip.data.lanes")}

    def lane(label):
        return (samples(made, label) * 10 ** (gains[label] / 20)).astype(np.float32)

    one, two = lane("variant one"), lane("variant two")
    start = int(np.flatnonzero(got)[0]) if got[0] == 0 else 0
    where = np.flatnonzero(np.isclose(one, got[start], atol=1e-6))
    begin = [
        w for w in where if np.allclose(np.roll(one, -w)[:200], got[start : start + 200], atol=1e-6)
    ]  # noqa: E501
    assert len(begin) == 1
    n = (np.arange(len(got) - start) + begin[0]) % RATE
    rest = got[start:]
    is_one, is_two = (np.isclose(rest, x[n], atol=1e-6) for x in (one, two))
    last = int(np.flatnonzero(~is_one)[0])  # up to here the first lane
    first = int(np.flatnonzero(~is_two)[-1]) + 1  # from here the second
    assert is_one[:last].all()
    assert is_two[first:].all()
    assert last > 1000
    assert len(rest) - first > 1000
    assert 0 < first - last <= FADE * RATE + 1


def test_keys_are_left_alone_while_somebody_types(page):
    page.keyboard.press("1")
    page.locator("#text").focus()
    page.keyboard.type("2 tl3+")
    now = state(page)
    assert (now["heard"], now["playing"], page.locator("#text").input_value()) == (
        "variant one", False, "2 tl3+",
    )  # fmt: skip
    assert now["loop"] is not None
    page.locator("select").first.focus()
    page.keyboard.press("3")
    assert state(page)["heard"] == "variant one"
    page.keyboard.press("Control+2")
    assert state(page)["heard"] == "variant one"


def test_space_plays_and_stops_also_when_a_lanes_name_has_the_focus(page):
    page.locator(".bl-name").nth(3).click()
    assert state(page)["heard"] == "variant two"
    page.keyboard.press(" ")
    assert state(page)["playing"]
    page.wait_for_function("strip.player.position() > 0.1")
    page.keyboard.press(" ")
    now = state(page)
    assert (now["playing"], now["heard"]) == (False, "variant two")
    assert now["at"] > 0.1


def test_a_drag_makes_a_loop_esc_ends_a_drag_and_a_double_click_the_loop(page):
    box = page.locator(".bl-plot").nth(2).bounding_box()
    left, width = box["x"] + 34, box["width"] - 34

    def drag(start, end, *, release=True):
        page.mouse.move(left + start * width, box["y"] + 30)
        page.mouse.down()
        page.mouse.move(left + end * width, box["y"] + 40, steps=3)
        if release:
            page.mouse.up()

    drag(0.75, 0.25, release=False)
    assert page.locator(".bl-region").first.is_visible()
    page.keyboard.press("Escape")
    page.mouse.up()
    assert state(page)["region"] is None
    drag(0.75, 0.25)
    now = state(page)
    assert now["region"] == pytest.approx([0.25, 0.75], abs=0.01)
    assert now["loop"] == now["region"]
    assert now["heard"] == "variant one"  # a drag is no click
    page.keyboard.press(" ")
    page.wait_for_function("strip.player.position() >= 0.25")
    assert 0.25 <= state(page)["at"] <= 0.76
    page.keyboard.press("l")
    assert state(page)["loop"] is None
    page.locator(".bl-plot").nth(4).dblclick(position={"x": 100, "y": 30})
    now = state(page)
    # Loop was off, and stays so.
    assert (now["region"], now["loop"], now["heard"]) == (None, None, "variant three")
    page.keyboard.press("l")
    assert state(page)["loop"] == [0, 1]


def test_the_loop_and_the_view_can_be_set_without_a_pointer(page):
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("[")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("]")
    assert state(page)["region"] == pytest.approx([0.3, 0.6], abs=0.01)
    page.keyboard.press("+")
    assert np.ptp(state(page)["view"]) == pytest.approx(0.5)
    page.keyboard.press("-")
    page.keyboard.press("+")
    page.keyboard.press("0")
    assert state(page)["view"] == [0, 1]


def test_the_wheel_zooms_only_once_the_strip_is_in_use(page):
    page.locator("#text").focus()
    page.locator(".bl-plot").nth(2).hover()
    page.mouse.wheel(0, -240)
    page.wait_for_timeout(100)
    assert state(page)["view"] == [0, 1]
    page.locator(".bl-plot").nth(2).click()
    page.mouse.wheel(0, -240)
    page.wait_for_function("strip.view[1] - strip.view[0] < 0.9")


def test_without_loudness_match_every_gain_is_one(page):
    assert state(page)["gains"][2:] != [1, 1, 1]
    page.get_by_role("button", name="Match loudness").click()
    assert state(page)["gains"] == [1] * 5
    assert "as loud as its file" in page.locator(".bl-note").inner_text()


def test_another_step_brings_its_own_files_and_keeps_what_is_heard(page, served):
    page.keyboard.press("2")
    page.get_by_label("Step").select_option("50")
    page.wait_for_function("strip.data.step === 50")
    assert state(page)["heard"] == "variant two"
    asked = [path for path in served[2] if "000-step-000050.wav" in path]
    assert len(asked) == 3
    got = render(page, lane=1, seconds=0.5)
    assert np.array_equal(got, samples(served[0], "variant two", 50)[:8000])


def test_a_refresh_adds_new_steps_and_loads_nothing_again(page, served):
    made, _, log = served
    for run in made.runs:
        put(run, "000-step-000150.wav", tone(100))
    before = len([path for path in log if "/file/" in path])
    page.evaluate("bgrayListening.refresh()")
    page.wait_for_function("strip.data.steps.length === 3")
    assert state(page)["heard"] == "variant one"
    assert page.get_by_label("Step").input_value() == "100"
    assert len([path for path in log if "/file/" in path]) == before


# --- spectrograms


LEVELS = """([hz, amplitude, scale]) => {
    const rate = 48000, rows = 100, columns = 40;
    const x = Float32Array.from({length: rate}, (_, i) =>
        amplitude * Math.sin(2 * Math.PI * hz * i / rate));
    const found = bgrayListening.spectrogram(x, rate,
        {from: 0, to: 1, columns, rows, scale});
    return Array.from({length: rows}, (_, row) => found[row * columns + 20]);
}"""


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("hz", [150, 1000, 12000])
def test_a_sine_is_one_line_at_its_frequency_and_level(scripts, hz, scale):
    levels = np.array(scripts.evaluate(LEVELS, [hz, 0.5, scale]))
    top = levels.argmax()
    share = 1 - (top + 0.5) / 100
    seen = 40 * (24000 / 40) ** share if scale == "log" else 24000 * share
    tolerance = 0.04 * hz if scale == "log" else 130
    assert seen == pytest.approx(hz, abs=tolerance + 15)
    assert levels[top] == pytest.approx(20 * np.log10(0.5), abs=1.5)  # Hann's scalloping
    assert (levels < levels[top] - 40).mean() > 0.6


def test_the_fft_is_numpys(scripts):
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.5, 0.5, 48000).astype(np.float32)
    rows, size = 8, 512
    got = scripts.evaluate(
        """([x, size, rows]) => Array.from(bgrayListening.spectrogram(Float32Array.from(x), 48000,
            {from: 0.5, to: 0.5 + 1 / 48000, columns: 1, rows, scale: "linear", size}))""",
        [x.tolist(), size, rows],
    )
    start = math.floor(24000 + 0.5 - size / 2 + 0.5)  # as JavaScript rounds
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    power = np.abs(np.fft.rfft(x[start : start + size] * window) * 4 / size) ** 2
    bands = [power[i * 32 : (i + 1) * 32 + 1].max() for i in range(rows)][::-1]
    assert got == pytest.approx(10 * np.log10(bands), abs=0.01)


def test_ten_lanes_of_three_seconds_are_drawn_soon(scripts):
    took = scripts.evaluate(
        """async () => {
            const rate = 48000;
            const samples = Float32Array.from({length: 3 * rate}, () => Math.random() - 0.5);
            const canvas = document.body.appendChild(document.createElement("canvas"));
            canvas.style = "width: 440px; height: 126px";
            const shown = {samples, rate, from: 0, to: 3, scale: "log", top: 0};
            bgrayListening.draw(canvas, shown);
            let best = Infinity;
            for (let run = 0; run < 5; run++) {
                let sum = 0;
                for (let i = 0; i < 10; i++) sum += bgrayListening.draw(canvas, shown);
                best = Math.min(best, sum);
            }
            return best;
        }"""
    )
    assert took < 8000  # about 200 ms on an idle machine; tests may share it
    print(f"{took:.0f} ms")


# --- blind tests


def test_abx_by_keys_with_x_known_to_the_server_alone(page, served):
    made, _, log = served
    page.get_by_role("button", name="ABX test").click()
    page.get_by_label("Trials").fill("6")
    page.get_by_label("Your name").fill("Ann")
    page.get_by_role("button", name="Begin").click()
    assert not list(Path(made.url).glob("listening/*"))
    for number in range(1, 7):
        page.wait_for_function(f"bgrayListening.test.question?.number === {number}")
        assert page.get_by_text(f"Trial {number} of 6").is_visible()
        assert page.get_by_role("button", name="X is A").is_disabled()  # X was not heard yet
        page.keyboard.press("1")
        assert page.evaluate("bgrayListening.test.question.number") == number
        # The page has nothing to go by but samples: find X by these, as an ear would.
        like = page.evaluate(
            """() => {
                const {names, player} = bgrayListening.test;
                const of = (name) => player.buffers[names.indexOf(name)].getChannelData(0);
                return of("x").every((value, i) => value === of("a")[i]) ? "1" : "2";
            }"""
        )
        page.keyboard.press("x")
        page.keyboard.press(like if number > 1 else {"1": "2", "2": "1"}[like])
    page.get_by_text("5 of 6", exact=True).wait_for()
    text = page.locator(".bl-dialog").inner_text()
    assert "p = 0.11: no difference was shown" in text
    assert "not proof" in text
    blind = [path for path in log if "/blind/" in path and path.count("/") == 5]
    assert len({path for path in blind}) == 18  # three new addresses for each trial
    (file,) = Path(made.url).glob("listening/*.json")
    assert '"who": "Ann"' in file.read_text()
    assert all(run.id not in path for path in blind for run in made.runs)
    page.get_by_role("button", name="Close").click()
    assert page.locator("dialog").count() == 0


def test_esc_in_a_test_asks_first_and_keys_of_the_strip_rest(page, served):
    page.keyboard.press("1")
    page.get_by_role("button", name="ABX test").click()
    page.get_by_role("button", name="Begin").click()
    page.wait_for_function("bgrayListening.test.question?.number === 1")
    page.keyboard.press("t")
    assert state(page)["heard"] == "variant one"
    page.keyboard.press("Escape")
    assert page.get_by_text("only a test that went to its end counts").is_visible()
    page.get_by_role("button", name="Go on").click()
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    page.locator(".bl-leave").get_by_role("button", name="Break off").click()
    assert page.locator("dialog").count() == 0


def test_blind_ranking_by_keys_over_two_clips(page, served):
    made = served[0]
    page.get_by_role("button", name="Blind ranking").click()
    page.get_by_role("button", name="Begin").click()
    for number in (1, 2):
        page.wait_for_function(f"bgrayListening.test.question?.number === {number}")
        assert "variant" not in page.locator(".bl-test").inner_text()
        page.keyboard.press("r")
        page.keyboard.press("1")  # the target has no place
        for name, place in zip("abc", "122", strict=True):
            page.keyboard.press(name)
            page.keyboard.press(place)
        page.keyboard.press("Enter")
    page.get_by_text("mean place").wait_for()
    from bgray.answers import results_of

    found = results_of(made.url)
    assert sorted(one.mean_rank for one in found.ranked)[0] >= 1
    assert sum(one.mean_rank for one in found.ranked) == pytest.approx(6)
    assert {one.answers for one in found.ranked} == {2}


def test_every_control_has_a_name_and_pressed_ones_say_so(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("#strip button, #strip select, #strip canvas")]
            .filter((one) => !(one.textContent || one.getAttribute("aria-label") ||
                one.labels?.length) && true).map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    loop = page.get_by_role("button", name="Loop", exact=True)
    assert loop.get_attribute("aria-pressed") == "true"
    loop.click()
    assert loop.get_attribute("aria-pressed") == "false"
    assert page.get_by_role("img", name="Spectrogram of target").is_visible()


def test_a_piano_rolls_picture_stands_where_a_spectrogram_would(page, served):
    from bgray.tasks.pianoroll import picture

    run = served[0].runs[2]
    level = np.zeros((8, 100), np.float32)
    level[:, 50:] = 1  # dark, then light
    Path(run.url, "clips", "000-step-000050.png").write_bytes(picture(level))
    page.get_by_label("Step").select_option("50")
    page.get_by_role("img", name="Piano roll of variant two").wait_for()
    page.wait_for_function("strip.cards[3].image && strip.drawn !== undefined")
    grey = """(share) => {
        const {canvas} = strip.cards[3];
        const x = (34 + share * (canvas.clientWidth - 34)) * devicePixelRatio;
        return canvas.getContext("2d").getImageData(x, 30, 1, 1).data[0];
    }"""
    page.wait_for_function(f"Math.abs(({grey})(0.25) - ({grey})(0.75)) > 200")
    assert page.get_by_role("img", name="Spectrogram of variant one").is_visible()


def test_what_plays_goes_on_when_the_page_refreshes_and_a_clip_is_damaged(page, served):
    run = served[0].runs[4]
    Path(run.url, "clips", "000-step-000050.wav").write_bytes(b"RIFF")
    page.get_by_label("Step").select_option("50")
    page.wait_for_function("strip.data.step === 50")
    assert "variant three (" in page.locator(".bl-note").inner_text()
    page.get_by_role("button", name="Play").click()
    page.evaluate("window.before = strip.player.voices")
    page.evaluate("bgrayListening.refresh()")
    assert page.evaluate("strip.player.voices === before && before !== null")
