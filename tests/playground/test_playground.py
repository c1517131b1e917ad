"""Laws of `minigpt playground`: the parts of its page, and the whole page in a browser if there is one."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt.cli import main
from minigpt.generation.sampling import Sampling, sample_text
from minigpt.playground.page import Player
from minigpt.playground.views import bars_html
from support.runs import ROOT
from support.tiny import CONTEXT, byte_tokenizer, letter_tokenizer, tiny_model


def test_the_text_on_the_page_grows_to_that_of_minigpt_generate() -> None:
    player = Player(tiny_model(), byte_tokenizer())
    options = {"max_new_tokens": 2 * CONTEXT, "temperature": 0.7, "top_k": 20, "top_p": 0.9}  # the context is refilled
    steps = list(player.generate("me", "ab", Sampling(**options), seed=3))
    assert [steps[-1][0]] == sample_text(player.model, player.tokenizer, ["ab"], seed=3, **options)
    lengths = [len(ids) for _, ids in steps]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 2 + 2 * CONTEXT
    assert not player.running


def test_the_page_never_shows_a_part_of_a_stop_text() -> None:
    player = Player(tiny_model(vocab_size=8), letter_tokenizer("abcdefgh"))
    *_, (free, _) = player.generate("me", "abc", Sampling(20), seed=1)
    stop = free[10:13]
    steps = [text for text, _ in player.generate("me", "abc", Sampling(20, stop=(stop,)), seed=1)]
    assert steps[-1] == "abc" + free[3:].partition(stop)[0]
    assert all(steps[-1].startswith(text) for text in steps)


def test_stop_ends_the_generation_of_that_visitor_only_and_the_next_one_can_start() -> None:
    player = Player(tiny_model(), byte_tokenizer())
    running = player.generate("me", "ab", Sampling(max_new_tokens=100_000), seed=0)
    next(running)
    player.stop("somebody else")
    next(running)
    player.stop("me")
    *_, (text, ids) = running
    assert text.startswith("ab")
    assert 2 < len(ids) < 10_000
    assert list(player.generate("me", "ab", Sampling(max_new_tokens=3), seed=0))[-1][1][:2] == ids[:2]


def test_a_visitor_who_leaves_ends_their_generation() -> None:
    player = Player(tiny_model(), byte_tokenizer())
    leaving = player.generate("me", "ab", Sampling(max_new_tokens=100_000), seed=0)
    next(leaving)
    leaving.close()
    assert player.lock.acquire(timeout=20)  # otherwise the thread would generate for minutes


def test_bars_are_proportional_to_probabilities_and_tokens_are_escaped() -> None:
    page = bars_html([("<b>&", 0.5), ("a", 0.25)])
    assert "&lt;b&gt;&amp;" in page
    assert re.findall(r"width: ([\d.]+)%", page) == ["100.0", "50.0"]
    assert re.findall(r">([\d.]+) %<", page) == ["50.0", "25.0"]


def test_the_attention_picture_names_its_tokens_and_hides_the_future() -> None:
    player = Player(tiny_model(), byte_tokenizer())
    ids = player.tokenizer("a$b$ c")["input_ids"]
    axes = player.attention(ids, layer=2, head=1).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("a$b$␣c")
    assert axes.get_title(loc="left") == "layer 2, head 1: 6 tokens"
    shown = axes.images[0].get_array()
    assert [row.count() for row in shown] == [1, 2, 3, 4, 5, 6]
    assert shown.sum(axis=1).tolist() == pytest.approx([1] * 6)


def test_without_gradio_one_line_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        main(["playground", "--model", "runs/none"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == 'minigpt playground: the playground needs Gradio: pip install "minigpt-lm[playground]"\n'


def test_an_address_in_use_is_one_line_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        main(["playground", "--model", "runs/none", "--port", str(taken.getsockname()[1])])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("minigpt playground: cannot listen on 127.0.0.1, port ")
    assert len(error.splitlines()) == 1


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a playground with a tiny model, which runs in another process."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    tiny_model().save_pretrained(tmp_path / "tiny")
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path / "tiny")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "minigpt", "playground", "--model", str(tmp_path / "tiny"), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
    try:
        printed = wait_for(
            lambda: re.search(r"playground: (http\S+)", (tmp_path / "log").read_text()) or server.poll()
        )
        assert isinstance(printed, re.Match), (tmp_path / "log").read_text()
        yield printed[1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by Selenium; neither is a dependency of the project."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium with chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
        options.add_argument(word)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Call `condition` until its result is true or the time is over; returns the last result."""
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return result


@pytest.mark.slow
def test_a_visitor_sees_text_bars_attention_and_one_line_for_a_prompt_too_long(address: str, browser: Any) -> None:
    def page(expression: str) -> Any:
        return browser.execute_script(f"const all = s => [...document.querySelectorAll(s)]; return {expression}")

    def picture() -> str:
        return page("all('#attention img').map(e => e.src).join()")

    def percentages() -> list[str]:
        return page("all('#bars .share').map(e => e.textContent)")

    def text() -> str:
        return page("all('#text textarea')[0].value")

    player = Player(tiny_model(), byte_tokenizer(eos_token="<|endoftext|>"))
    *_, (written, ids) = player.generate("test", "Once upon", Sampling(100, temperature=0.8, top_k=50), seed=0)
    written = re.sub("\r\n?", "\n", written)  # as a text box does

    browser.get(address)
    assert wait_for(picture)  # of the empty prompt: the start of a text
    first = picture()
    assert len(percentages()) == page("all('#bars .bar').length") == 10
    prompt = browser.find_element("css selector", "#prompt textarea")
    prompt.send_keys("Once upon")
    typed = re.findall(r">([\d.]+ %)<", player.bars(ids[:9]))
    assert wait_for(lambda: percentages() == typed)  # the views follow the typed prompt
    assert wait_for(lambda: picture() != first)
    browser.find_element("id", "generate").click()
    assert wait_for(lambda: text() == written)
    after = re.findall(r">([\d.]+ %)<", player.bars(ids))
    assert wait_for(lambda: percentages() == after)  # and then the generated text
    assert page("all('#attention img')[0].naturalWidth") > 200
    assert not page("all('#problem')[0].innerText.trim()")

    prompt.send_keys("x" * CONTEXT)
    message = f"the prompt has {9 + CONTEXT} tokens, but the context holds {CONTEXT}"
    assert wait_for(lambda: page("all('#problem')[0].innerText").strip().startswith(message))
    browser.find_element("id", "generate").click()
    time.sleep(1)
    assert len(page("all('#problem')[0].innerText").strip().splitlines()) == 1
    assert text() == written
