"""The dashboard's page in a real browser."""

import json
import shutil
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import Seen, dashboard, until

from bgray import storage
from bgray.compare import compare
from bgray.reading import Reader
from bgray.specimen import Made, make

SHAPE = {"steps": 100, "evaluations": 5, "items": 4, "clips": 1, "clip_seconds": 0.5}
LONG = "growing kernels, whose name does not stop before the end of the line " * 3
VARIANTS = [
    Made("baseline"),
    Made("longer", {"model.kernels": [7, 23, 41]}, gain=0.05),
    Made(LONG, {"model.kernels": [7]}, gain=-0.05),
    Made("<b>bold</b>", {"optim.lr": 0.01}, state="failed", reason="<i>no</i> memory", until=60),
    Made("halved", {"optim.lr": 0.0025}, state="stopped", reason="pruned by ASHA", until=40),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("results") / "kernels")
    make(place, VARIANTS, seeds=2, **SHAPE)
    return place


@pytest.fixture(scope="module")
def server(folder):
    with dashboard(folder) as made:
        yield made


def opened(browser, address, *, size=(1440, 900)):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(60_000)
    page.seen = Seen(page)
    page.goto(address)
    page.wait_for_selector("tr.row")
    return page


@pytest.fixture
def page(browser, server):
    made = opened(browser, server.address)
    made.wait_for_selector(".bl-lane canvas")
    yield made
    assert made.seen.errors == []
    made.close()


def labels(page):
    """Of the rows that are shown, from top to bottom."""
    return page.eval_on_selector_all(
        "tbody:not([hidden]) tr.row .label", "found => found.map(e => e.textContent)"
    )


def chosen(page):
    return page.eval_on_selector_all(
        "tr.row[aria-selected=true]",
        "found => found.map(e => [e.querySelector('.lane').textContent, "
        "e.querySelector('.label').textContent])",
    )


def drawn(page, id):
    """Wait for a figure that holds more than its first words; off the screen none is drawn."""
    page.locator(f"#{id}-scroll").scroll_into_view_if_needed()
    page.wait_for_function(
        f"() => (document.querySelector('#{id} .js-plotly-plot') || {{data: []}}).data.length > 0"
    )


def test_the_table_shows_what_bgray_compare_prints_to_the_digit(page, folder):
    results = Reader(folder).read()
    heads = page.eval_on_selector_all(
        ".variants thead th", "found => found.map(e => e.dataset.key)"
    )
    rows = page.eval_on_selector_all(
        "tr.row",
        "found => found.map(e => [e.dataset.id, [...e.cells].map(c => c.innerText)])",
    )
    assert [id for id, _ in rows] == [row.id for row in compare(results.variants, name="").rows]
    for metric in ("val_stft", "val_si_sdr"):
        comparison = compare(results.variants, name="", metric=metric)
        means, differences, verdicts = (
            list(comparison.table().columns[i].cells) for i in (3, 4, 6)
        )
        for place, (_, cells) in enumerate(rows):
            shown = dict(zip(heads, cells, strict=True))
            assert means[place] in shown[metric]
            if place:
                row = comparison.rows[place]
                assert shown[metric].startswith(differences[place])
                base = row.mean - row.parts.mean
                assert shown[metric].endswith(f"baseline {base:.4f}")
            if metric == "val_stft":
                assert shown["verdict"] in verdicts[place] or place == 0


def test_no_request_leaves_the_host(page, server):
    for id in ("curves", "quality", "parallel"):
        drawn(page, id)
    page.keyboard.press(" ")
    page.wait_for_timeout(2500)  # over a refresh
    assert len(page.seen.urls) > 20
    assert page.seen.hosts == {f"127.0.0.1:{server.port}"}


def test_failed_and_stopped_trials_are_shown_with_their_reason_as_text(page):
    row = page.locator("tbody", has_text="<b>bold</b>")
    assert "✗ failed\n" in row.inner_text()
    assert "seed 0 failed at step 60: <i>no</i> memory" in row.inner_text()
    stopped = page.locator("tbody", has_text="halved")
    assert "■ stopped seed 0 @40" in stopped.inner_text()
    assert page.locator("#chips").inner_text().split("\n") == [
        "● finished 8",
        "■ stopped 1",
        "✗ failed 1",
    ]
    # The details begin with what went wrong.
    page.wait_for_selector("#details-body .chip.failed")
    assert "<i>no</i> memory" in page.locator("#details-body").inner_text()
    assert page.locator("main i, main td b b").count() == 0


def test_a_header_sorts_both_ways_and_then_gives_the_first_order_back(page):
    first = labels(page)
    head = page.locator("th[data-key=variant] button")
    head.click()
    assert labels(page) == sorted(first, key=str.lower)
    assert page.locator("th[data-key=variant]").get_attribute("aria-sort") == "ascending"
    head.click()
    assert labels(page) == sorted(first, key=str.lower)[::-1]
    head.click()
    assert labels(page) == first
    assert page.locator("[aria-sort]").count() == 0


def test_the_filter_looks_at_names_settings_and_states(page):
    for text, left in {
        "longer": ["longer"],
        "LR 0.01": ["<b>bold</b>"],
        "stopped": ["halved"],
        "no such": [],
    }.items():
        page.fill("#filter", text)
        assert labels(page) == left
    assert page.locator("#shown-count").inner_text() == "0 of 5"
    page.fill("#filter", "")
    assert len(labels(page)) == 5


def test_rows_are_chosen_and_reached_by_keyboard_alone(page):
    page.focus("#filter")
    page.keyboard.press("Tab")
    while not page.evaluate("document.activeElement.matches('tr.row')"):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.querySelector('.label').textContent") == "baseline"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    before = [label for _, label in chosen(page)]
    page.keyboard.press("End")
    last = page.evaluate("document.activeElement.querySelector('.label').textContent")
    assert last == labels(page)[-1]
    assert last not in before
    page.keyboard.press("Enter")
    assert [label for _, label in chosen(page)] == [*before, last]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")  # which starts nothing here
    assert page.locator(".bl-play").inner_text() == "▶ Play"
    assert labels(page)[1] not in [label for _, label in chosen(page)]


def test_the_digit_on_a_row_is_the_key_that_plays_it(page, folder):
    results = Reader(folder).read()
    page.wait_for_function(
        "() => document.querySelectorAll('tr .lane[title]:not([title=\"\"])').length > 1"
    )
    for digit, label in chosen(page):
        page.keyboard.press(digit)
        heard = page.locator(".bl-heard")
        assert heard.locator(".bl-label").inner_text().strip() == label.strip()
        runs = {trial.id for trial in results.trials.values() if trial.label == label}
        # Its sound came from one of its own runs.
        assert any(f"/file/{run}/" in url for run in runs for url in page.seen.urls)
    served = {url.split("/file/")[1].split("/")[0] for url in page.seen.urls if "-step-" in url}
    assert served == {
        next(t.id for t in results.trials.values() if t.label == label and t.seed == 0)
        for _, label in chosen(page)
    }


@pytest.mark.slow
def test_choosing_changes_the_lanes_and_the_figures_and_nine_are_the_most(browser, tmp_path):
    place = str(tmp_path / "ten")
    many = [Made(f"v{i}", {"optim.lr": 0.001 * (i + 1)}, gain=0.01 * i) for i in range(11)]
    make(place, many, seeds=1, **{**SHAPE, "clip_seconds": 0.1})
    with dashboard(place) as server:
        page = opened(browser, server.address)
        page.wait_for_function("() => document.querySelectorAll('.bl-lane').length == 6")
        there = {label for _, label in chosen(page)}
        for label in [label for label in labels(page) if label not in there][:6]:
            page.get_by_text(label, exact=True).first.click()
        assert len(chosen(page)) == 9
        assert "nine are the most" in page.locator("#shown-count").inner_text()
        page.wait_for_function("() => document.querySelectorAll('.bl-lane').length == 11")
        page.wait_for_function(
            "() => document.querySelectorAll('.lane[title^=\"Key 9\"]').length == 1"
        )
        page.reload()  # what was chosen is still chosen
        page.wait_for_function("() => document.querySelectorAll('.bl-lane').length == 11")
        page.close()


CONTRAST = """() => {
  const curve = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) =>
    0.2126 * curve(r / 255) + 0.7152 * curve(g / 255) + 0.0722 * curve(b / 255);
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const found = [];
  for (const e of document.querySelectorAll('header *, main *')) {
    if (e.closest('svg, canvas, .js-plotly-plot, [hidden], :disabled')) continue;
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    let under = e, paper = [255, 255, 255];
    for (; under; under = under.parentElement) {
      const back = rgb(getComputedStyle(under).backgroundColor);
      if (back.length < 4 || back[3] === 1) { paper = back; break; }
    }
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(paper)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, e.textContent.slice(0, 40), e.className]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""
NAMELESS = """() => [...document.querySelectorAll('button, select, input')]
  .filter(e => !e.closest('.js-plotly-plot'))
  .filter(e => !(e.tagName === 'BUTTON' && e.textContent.trim()))
  .filter(e => !e.labels?.length && !e.ariaLabel && !e.title)
  .map(e => e.outerHTML)"""
TIMES = """() => {
  const { table, state } = bgrayPage.page;
  const timed = (f) => {
    const began = performance.now();
    f();
    document.body.offsetHeight; // lays out what has changed
    return performance.now() - began;
  };
  return {
    filter: timed(() => table.filter('variant 49')),
    all: timed(() => table.filter('')),
    sort: timed(() => table.sort('val_stft')),
    refresh: timed(() => table.draw(state)),
  };
}"""


def test_every_text_has_a_contrast_of_four_and_a_half_and_every_control_a_name(page):
    page.wait_for_selector("#details-body dl")
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:3]
    assert page.evaluate(NAMELESS) == []
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1


@pytest.mark.parametrize("size", [(390, 844), (1440, 900)])
def test_the_page_itself_never_scrolls_sideways(browser, server, size):
    page = opened(browser, server.address, size=size)
    page.wait_for_selector(".bl-lane canvas")
    drawn(page, "parallel")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    table = page.locator("#table-scroll")
    assert table.evaluate("e => e.scrollWidth >= e.clientWidth")
    if size[0] == 1440:  # above the fold: state, table, and the listening strip's first row
        assert page.locator(".bl-play").bounding_box()["y"] < 700
    page.close()


@pytest.mark.slow
def test_a_sweep_in_progress_grows_on_the_page_without_a_reload_and_keeps_what_the_user_did(
    browser, tmp_path
):
    whole, place = str(tmp_path / "whole" / "grows"), tmp_path / "grows"
    make(whole, VARIANTS, seeds=1, **SHAPE)
    manifest = json.loads(storage.read_bytes(f"{whole}/sweep.json"))
    runs = [variant["runs"]["0"] for variant in manifest["variants"].values()]
    place.mkdir()
    with dashboard(place) as server:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.seen = Seen(page)
        page.goto(server.address)
        page.wait_for_selector(".waits")
        assert "Waiting for a first run" in page.locator(".waits").inner_text()
        page.evaluate("window.same = true")
        storage.write_bytes(f"{place}/sweep.json", json.dumps(manifest).encode())
        for run in runs[:2]:
            shutil.copytree(f"{whole}/{run}", place / run)
        page.wait_for_function("() => document.querySelectorAll('#chips .finished').length == 1")
        assert page.locator("#chips .finished").inner_text() == "● finished 2"

        drawn(page, "curves")
        page.locator("th[data-key=variant] button").click()
        page.locator("tr.row", has_text="halved").click()
        page.fill("#filter", "e")
        page.wait_for_timeout(500)
        page.locator("#curves-scroll").scroll_into_view_if_needed()
        box = page.locator("#curves .nsewdrag").first.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.2 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=5)
        page.mouse.up()
        zoom = "document.querySelector('#curves .js-plotly-plot').layout.xaxis.range"
        page.wait_for_function(f"() => {zoom}[0] > 10")
        dragged = page.evaluate(zoom)
        page.locator(".bl-play").click()
        page.wait_for_function(
            "() => document.querySelector('.bl-play').innerText.includes('Stop')"
        )
        before = (labels(page), [label for _, label in chosen(page)])
        figure = "document.querySelector('#curves .js-plotly-plot').data.length"
        count = page.evaluate(figure)

        for run in runs[2:]:
            shutil.copytree(f"{whole}/{run}", place / run)
        page.wait_for_function(
            "() => document.querySelector('#chips .finished').innerText == '● finished 3'"
        )
        assert page.locator("#said").inner_text() == "3 finished, 1 stopped, 1 failed"
        page.wait_for_timeout(3000)
        assert page.evaluate("window.same")
        assert (labels(page), [label for _, label in chosen(page)]) == before
        assert page.locator("th[data-key=variant]").get_attribute("aria-sort") == "ascending"
        assert page.evaluate(zoom) == dragged
        assert "Stop" in page.locator(".bl-play").inner_text()
        page.locator("#curves-scroll").scroll_into_view_if_needed()
        page.wait_for_function(f"() => {figure} > {count}")
        assert page.seen.errors == []
        page.close()


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_and_so_is_one_that_is_back(browser, folder):
    def start(port):
        command = [sys.executable, "-m", "bgray.dashboard", folder, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().split()[-1]

    process, address = start(0)
    try:
        page = opened(browser, address)
        process.kill()
        process.wait()
        page.wait_for_selector("#gone:not([hidden])")
        assert "does not answer" in page.locator("#gone").inner_text()
        assert len(labels(page)) == 5
        process, again = start(urlsplit(address).port)
        assert again == address
        page.wait_for_selector("#gone", state="hidden")
        page.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_hidden_tab_asks_for_nothing_and_a_shown_one_at_once(page):
    def asked():
        return sum("/api/state" in url for url in page.seen.urls)

    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(2500)  # what was on its way has come
    before = asked()
    page.wait_for_timeout(5000)
    assert asked() == before
    at_once = page.evaluate(
        """() => {
            let asked = 0;
            const { fetch } = window;
            window.fetch = (...what) => (asked++, fetch(...what));
            Object.defineProperty(document, "hidden", {value: false});
            document.dispatchEvent(new Event("visibilitychange"));
            window.fetch = fetch;
            return asked;
        }"""
    )
    assert at_once == 1
    until(page, lambda: asked() > before)


@pytest.mark.slow
def test_the_token_opens_the_page_and_is_gone_from_its_address(browser, folder):
    with dashboard(folder, host="0.0.0.0") as server:
        address = f"http://127.0.0.1:{server.port}/"
        context = browser.new_context()
        page = context.new_page()
        assert page.goto(address).status == 401
        assert "open the address" in page.content()
        page.goto(f"{address}?token={server.token}")
        page.wait_for_selector("tr.row")
        assert page.url == address
        assert page.evaluate("document.cookie") == ""  # no script can read it
        drawn(page, "curves")
        assert browser.new_context().new_page().goto(address).status == 401
        context.close()


@pytest.mark.slow
def test_a_damaged_run_is_said_on_the_page(browser, tmp_path):
    place = str(tmp_path / "kernels")
    make(place, VARIANTS, seeds=1, **SHAPE)
    run = next(iter(Reader(place).read().trials))
    storage.write_bytes(f"{place}/{run}/run.json", b'{"state": "fin')
    with dashboard(place) as server:
        page = opened(browser, server.address)
        assert f"{run}/run.json" in page.locator("#notes").inner_text()
        assert "✗ damaged" in page.locator("#variants").inner_text()
        page.locator("th[data-key=variant] button").click()
        order = labels(page)
        whole = storage.read_bytes(f"{place}/sweep.json")
        storage.write_bytes(f"{place}/sweep.json", whole[:-20])
        page.wait_for_function(
            "() => /sweep.json/.test(document.querySelector('#notes').innerText)"
        )
        assert labels(page) == order  # what was read before stays
        storage.write_bytes(f"{place}/sweep.json", whole)
        page.wait_for_function(
            "() => !/sweep.json/.test(document.querySelector('#notes').innerText)"
        )
        assert labels(page) == order
        assert page.seen.errors == []
        page.close()


@pytest.mark.slow
def test_several_sweeps_have_a_selector_and_a_new_one_comes_by_itself(browser, tmp_path):
    make(str(tmp_path / "one"), VARIANTS[:2], seeds=1, **SHAPE)
    make(str(tmp_path / "two"), VARIANTS[:3], seeds=1, **SHAPE)
    with dashboard(tmp_path) as server:
        page = opened(browser, server.address)
        assert page.locator("#sweep-title").inner_text() == "one"
        page.select_option("#sweep-select", "two")
        page.wait_for_function("() => document.querySelectorAll('tr.row').length == 3")
        make(str(tmp_path / "three"), VARIANTS[:1], seeds=1, **SHAPE)
        page.wait_for_function(
            "() => document.querySelectorAll('#sweep-select option').length == 3"
        )
        assert page.locator("#sweep-title").inner_text() == "two"
        page.close()


@pytest.mark.slow
@pytest.mark.alone
def test_five_hundred_trials_stay_fluent(browser, tmp_path, capsys):
    place = str(tmp_path / "many")
    rng = np.random.default_rng(0)
    many = [
        Made(f"variant {i}", {"optim.lr": float(rng.uniform(1e-4, 1e-1))}, gain=rng.normal(0, 0.03))
        for i in range(500)
    ]
    make(place, many, seeds=1, **{**SHAPE, "clips": 0})
    with dashboard(place) as server:
        began = time.perf_counter()
        page = opened(browser, server.address)
        shown = time.perf_counter() - began
        assert len(labels(page)) == 500
        drawn(page, "curves")
        drawn(page, "parallel")
        assert page.locator(".no-webgl").count() == 0  # which a stricter policy would bring about
        times = page.evaluate(TIMES)
        page.close()
    with capsys.disabled():
        print({"rows shown after, s": round(shown, 2)} | {k: round(v) for k, v in times.items()})
    # About a hundred times what it takes: the figures to quote are those that are printed.
    assert times["filter"] < 3000
    assert times["refresh"] < 1000
