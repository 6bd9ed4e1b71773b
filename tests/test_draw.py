"""mann-fast draw: what it makes of strokes, what it shows, its command line, and the page in a browser."""

import html
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from mann_fast import FewShotLearner
from mann_fast.cli import _page, main
from mann_fast.cli._page import SIDE, Example, add_example, drawing, judge, show_examples

CROSS = [[[0.35, 0.35], [0.65, 0.62]], [[0.65, 0.35], [0.35, 0.62]]]
TENT = [[[0.5, 0.3], [0.3, 0.65], [0.7, 0.65], [0.5, 0.3]]]
WAVE = [[[0.25, 0.5], [0.33, 0.4], [0.42, 0.5], [0.5, 0.6], [0.58, 0.5], [0.66, 0.4], [0.75, 0.5]]]


def ink(strokes, scale=1.0, shift=0.0):
    return drawing(json.dumps([[[scale * x + shift, scale * y + shift] for x, y in s] for s in strokes]))


def test_a_drawing_is_the_same_wherever_it_is_and_however_large():
    found = ink(CROSS)
    assert found.shape == (SIDE, SIDE) and found.dtype == np.uint8 and found.max() == 255
    rows, columns = (np.flatnonzero(found.max(axis)) for axis in (1, 0))
    assert np.ptp(columns) == pytest.approx(_page.SYMBOL + _page.PEN, abs=3)  # 0.30 wide, 0.27 high
    assert np.ptp(rows) == pytest.approx(0.9 * _page.SYMBOL + _page.PEN, abs=3)
    assert rows[0] + rows[-1] == pytest.approx(SIDE, abs=3)
    for other in (ink(CROSS, 0.8, 0.3), ink(CROSS, 1.4, -0.4)):
        assert np.abs(other.astype(int) - found).mean() < 2
    assert 0 < np.count_nonzero(ink([[[0.9, 0.9]]])) < 40  # a dot stays one
    line = ink([[[0.1, 0.5], [0.9, 0.5]]])
    assert np.ptp(np.flatnonzero(line.max(1))) < 8


def test_no_ink_is_no_drawing():
    for canvas in (None, "", "[]", "[[]]"):
        assert drawing(canvas) is None


@pytest.mark.parametrize(
    "canvas",
    [
        "{",
        "7",
        "[7]",
        "[[7]]",
        "[[[0, 2]]]",
        "[[[0, NaN]]]",
        '[[["a", 0]]]',
        "[[[0, 0], [0]]]",
        "[[[0, 0, 0]]]",
    ],
)
def test_what_is_no_drawing_is_refused(canvas):
    with pytest.raises(ValueError, match=r"list of strokes, each of points \[x, y\] from 0 to 1"):
        drawing(canvas)
    with pytest.raises(ValueError, match="may take 200,000 characters"):
        drawing("[" + " " * 200_000)


def test_it_answers_and_shows_where_from():
    learner = FewShotLearner.load(orders=4)
    known = ()
    for name, strokes in (("<b>", CROSS), ("tent", TENT), ("<b>", CROSS), ("tent", TENT)):
        assert "two symbols" in judge(learner, known, ink(CROSS)) or len(known) > 1
        known = add_example(known, ink(strokes), f" {name} ", ways=5)
    said = judge(learner, known, ink(TENT))
    assert re.search(r'class="answer"[^>]*>(.*?)<', said)[1] == "tent"
    assert "<b>" not in said and html.escape("<b>") in said
    assert said.count("<img") == 4 and said.count('<i title="slot ') == learner.config.slots
    shares = [int(share) for share in re.findall(r"figcaption>(\d+)%", said)]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 102
    assert not hasattr(learner, "classes_")  # visitors share its model, and nothing that they teach
    assert show_examples(known, 5).count("<img") == 4
    assert "Draw something" in judge(learner, known, None)


@pytest.mark.parametrize("shipped", ["omniglot", "omniglot-stream"])
def test_shares_of_what_was_read_make_a_whole(shipped):
    learner = FewShotLearner.load(shipped, orders=2, views=1)
    said = judge(learner, (Example(ink(CROSS), "a"), Example(ink(TENT), "b")), ink(TENT))
    shares = [int(share) for share in re.findall(r"(?:figcaption>|had written |other )(\d+)%", said)]
    assert len(shares) == 3 + (shipped == "omniglot-stream")  # which alone writes before it reads
    assert sum(shares) == pytest.approx(100, abs=2)


def test_what_cannot_be_remembered_is_said():
    known = tuple(Example(ink(CROSS), str(at)) for at in range(5))
    for arguments, message in (
        ((known, None, "a"), "Draw a symbol"),
        ((known, ink(TENT), "  "), "a name"),
        ((known, ink(TENT), "six"), "5 symbols"),
    ):
        with pytest.raises(ValueError, match=message):
            add_example(*arguments, ways=5)
    assert len(add_example(known, ink(TENT), "4", ways=5)) == 6


def test_mistakes_are_one_line(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a)
    )
    assert main(["draw"]) == 2
    assert (
        capsys.readouterr().err
        == "mann-fast: error: mann-fast draw needs gradio: pip install mann_fast[draw]\n"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True)
    assert main(["draw", "--port", "70000"]) == 2
    assert "--port must be between 0 and 65535, got 70000" in capsys.readouterr().err
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["draw", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--port {port} cannot be used: Address already in use" in said


FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture
def address():
    """Of a page that mann-fast draw serves; it must end on Ctrl-C, without a traceback."""
    command = [sys.executable, "-m", "mann_fast", "draw", "--port", "0", "--no-browser"]
    nowhere = {"http_proxy": "http://localhost:9", "https_proxy": "http://localhost:9"}  # must not be asked
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **nowhere}
    ) as server:
        try:
            yield re.search(r"http\S+", server.stdout.readline())[0]
        finally:
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=30)[1]
    assert server.returncode == 130 and "Traceback" not in said, said


@pytest.mark.once
def test_symbols_drawn_with_the_mouse_are_learned_and_known_again(tmp_path, request):
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}; make draw installs it")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import expect, sync_playwright

    address = request.getfixturevalue("address")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=FLAGS) as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1000, "height": 885})
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(error))
        page.goto(address)
        canvas, answer = page.locator("#canvas canvas"), page.locator("#answer")
        canvas.wait_for()

        def draw(strokes, shift=0.0, stretch=1.0):
            box = canvas.bounding_box()
            for stroke in strokes:
                for at, (x, y) in enumerate(stroke):
                    place = box["x"] + box["width"] * (x * stretch + shift), box["y"] + box["height"] * y
                    page.mouse.move(*place, steps=4)
                    if at == 0:
                        page.mouse.down()
                page.mouse.up()

        page.locator("#remember").click()
        expect(page.locator("#note")).to_contain_text("Draw a symbol first")
        count = 0
        for name, strokes in (("cross", CROSS), ("tent", TENT), ("wave", WAVE)):
            for shift, stretch in ((0, 1), (-0.1, 1.1)):
                draw(strokes, shift, stretch)
                page.locator("#name").locator("input, textarea").fill(name)
                page.locator("#remember").click()
                count += 1
                expect(page.locator("#examples img")).to_have_count(count)
                expect(answer).to_contain_text("Draw something")
        place = canvas.bounding_box()
        draw(TENT, 0.05, 0.95)
        expect(answer.locator(".answer")).to_have_text("tent")
        assert canvas.bounding_box() == place  # it stays below the pen
        page.screenshot(path=os.environ.get("MANN_FAST_PICTURE", tmp_path / "draw.png"))
        page.get_by_text("Undo").click()
        expect(answer).to_contain_text("Draw something")
        draw(CROSS, 0.05, 0.95)
        expect(answer.locator(".answer")).to_have_text("cross")
        page.get_by_text("Clear").click()
        expect(answer).to_contain_text("Draw something")
        page.get_by_text("Forget the last").click()
        expect(page.locator("#examples img")).to_have_count(5)

        other = chromium.new_page()  # another visitor, who has taught it nothing
        other.goto(address)
        expect(other.locator("#examples")).to_contain_text("Nothing yet")
        assert not wrong
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
