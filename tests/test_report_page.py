import re
from pathlib import Path

import pytest
from browser import Seen

from bgray import report
from bgray.specimen import Made, make

EVIL = "<img src=https://example.org/x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep with its report: names that are markup, one that diverged, one on its way."""
    folder = tmp_path_factory.mktemp("page") / "kernels"
    variants = [
        Made("base"),
        Made("a much too long name " * 8, {"model.kernels": [7, 23, 41]}, gain=0.05),
        Made(EVIL, {"optim.lr": 0.01}, gain=-0.1),
        Made("lost", {"optim.lr": 0.1}, state="diverged", until=50, reason=EVIL),
        Made("on its way", {"optim.lr": 0.2}, state="running", until=50),
    ]
    make(
        str(folder), variants, seeds=2, steps=100, evaluations=4, items=4, clips=1, clip_seconds=0.2
    )
    list(report.write([str(folder)]))
    return folder


def page_of(folder):
    return (folder / "report.html").read_text()


def test_what_people_wrote_is_text_and_not_markup(folder):
    page = page_of(folder)
    assert "<img src=https" not in page
    assert "&lt;img src=https://example.org/x onerror=alert(1)&gt;" in page
    assert "</script><script>alert(2)" not in page


def test_the_page_may_fetch_nothing_and_run_only_its_own_scripts(folder):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page_of(folder))[1]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-eval' 'sha256-")
    assert "http" not in policy
    assert "connect-src" not in policy  # default-src forbids it
    head = page_of(folder).partition("<script")[0]
    assert not re.search(r'(src|href)="(https?:)?//', head)


def test_every_clip_is_linked_relatively_and_there(folder):
    links = re.findall(r'<audio [^>]*src="([^"]+)"', page_of(folder))
    assert len(links) == 2 + 5
    assert all((folder / link).is_file() for link in links)


def test_tables_have_captions_and_heads_with_a_scope(folder):
    page = page_of(folder).partition("<script")[0]
    assert page.count("<table") == page.count("<caption>") == 2
    assert "<th>" not in page
    assert '<html lang="en">' in page


@pytest.fixture(params=[(1440, 900), (390, 844)], ids=["desktop", "phone"])
def page(browser, folder, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.seen = Seen(page)
    page.goto((folder / "report.html").as_uri())
    yield page
    page.close()


@pytest.mark.slow
def test_a_browser_draws_all_figures_without_an_error_or_a_request_elsewhere(page, folder):
    plots = page.locator(".plot")
    for number in range(plots.count()):
        plots.nth(number).scroll_into_view_if_needed()
        plots.nth(number).locator(".main-svg").first.wait_for()
    assert plots.count() == 7
    page.locator("canvas").first.wait_for()  # parallel coordinates, by WebGL
    assert page.seen.errors == []
    wanted = {(folder / "report.html").as_uri()}
    assert {url for url in page.seen.urls if not url.startswith(("data:", "blob:"))} == wanted


@pytest.mark.slow
def test_nothing_is_wider_than_the_screen(page):
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot .main-svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_a_click_on_a_head_sorts_twice_and_then_gives_the_sweeps_order_back(page):
    names = "[...document.querySelectorAll('table.sorts tbody th')].map(cell => cell.textContent)"
    head = page.locator("table.sorts thead th", has_text="val_stft")
    before = page.evaluate(names)
    head.get_by_role("button").press("Enter")
    rising = page.evaluate(names)
    assert head.get_attribute("aria-sort") == "ascending"
    assert rising[0].startswith("a much too long name")
    assert rising[-1] == "unprocessed input"  # not compared
    head.get_by_role("button").click()
    falling = page.evaluate(names)
    assert falling[:-1] == rising[:-1][::-1]
    assert falling[-1] == "unprocessed input"
    head.get_by_role("button").click()
    assert page.evaluate(names) == before


@pytest.mark.slow
def test_a_clip_plays_from_beside_the_file_and_stops_when_another_one_does(page, folder):
    play = "audio => audio.play().then(() => audio.currentSrc)"
    first, second = page.locator("audio").nth(0), page.locator("audio").nth(3)
    for audio in (first, second):
        source = audio.evaluate(play)
        assert source.startswith(folder.as_uri() + "/")
        assert Path(source.removeprefix("file://")).is_file()
    assert first.evaluate("audio => audio.paused")
    assert page.seen.errors == []


@pytest.mark.slow
def test_a_script_that_is_slipped_in_does_not_run(page):
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'window.slipped = 1'}))"
    )
    assert page.evaluate("window.slipped") is None
    assert any("Content Security Policy" in text for text in page.seen.errors)
