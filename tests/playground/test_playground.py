"""Laws of `minigpt playground`: the parts of its page, and the whole page in a browser if there is one."""

import importlib.util
import itertools
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import pytest

from minigpt.cli import main
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.tokenizer import load_tokenizer
from minigpt.export.html import static_page
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling, sample_text
from minigpt.modeling.loading import load_model
from minigpt.playground.copies import CopyMarker, MarkedText
from minigpt.playground.player import Player
from minigpt.playground.views import bars_html
from minigpt.utils.errors import UserError
from support.browser import chromium
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


def test_an_answer_on_the_page_grows_to_that_of_a_conversation() -> None:
    player = chat_player()
    sampling = Sampling(24, temperature=0)
    alone, on_page = chat(player), chat(player)
    for question in ("why?", "and then?", "x" * 20):  # the context of three turns is full
        alone.ask(question, sampling, seed=0)
        steps = ask(player, "me", on_page, question, sampling)
        assert on_page.messages == alone.messages
        assert len(steps) > 2
        assert all(on_page.messages[-1]["content"].startswith(step) for step in steps)
    assert on_page.dropped_turns == alone.dropped_turns == 1


def test_visitors_who_chat_at_the_same_time_get_the_answers_that_they_get_alone() -> None:
    player = chat_player()
    questions = {"ann": "why?", "bob": "and then?"}
    sampling = Sampling(20, temperature=1.0)
    conversations = {name: chat(player) for name in questions}
    answers = []
    for seed, (name, question) in enumerate(questions.items()):
        conversations[name].messages.append({"role": "user", "content": question})
        answers.append(player.answer(name, conversations[name], sampling, seed))
    for _ in itertools.zip_longest(*answers):
        pass
    for seed, (name, question) in enumerate(questions.items()):
        alone = chat(player)
        alone.ask(question, sampling, seed)
        assert conversations[name].messages == alone.messages
    assert not player.running


def test_a_stopped_answer_stays_as_far_as_it_came_and_a_question_too_long_gets_none() -> None:
    player = chat_player(max_position_embeddings=100_000)
    conversation = chat(player)
    conversation.messages.append({"role": "user", "content": "why?"})
    running = player.answer("me", conversation, Sampling(max_new_tokens=90_000), seed=0)
    while not (seen := next(running)):  # the first tokens may be no whole character
        pass
    player.stop("me")
    list(running)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[-1]["content"].startswith(seen)
    assert len(conversation.messages[-1]["content"]) < 10_000

    conversation.messages.append({"role": "user", "content": 100_000 * "x"})
    with pytest.raises(UserError, match="ask a shorter question"):
        list(player.answer("me", conversation, Sampling(10), seed=0))
    assert conversation.messages[-1]["role"] == "user"
    assert player.lock.acquire(timeout=20)


def chat_player(**config: object) -> Player:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    set_chat_template(tokenizer, read_chat_template("chatml"))
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 6 * CONTEXT}
    return Player(tiny_model(**shape | config), tokenizer)


def chat(player: Player) -> Conversation:
    return Conversation(player.model, player.tokenizer)


def ask(player: Player, visitor: str, conversation: Conversation, question: str, sampling: Sampling) -> list[str]:
    """What the page shows of the answer while it is generated."""
    conversation.messages.append({"role": "user", "content": question})
    return list(player.answer(visitor, conversation, sampling, seed=0))


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
    with serving(Player(tiny_model(), byte_tokenizer(eos_token="<|endoftext|>")), tmp_path) as address:
        yield address


@pytest.fixture
def chat_address(tmp_path: Path) -> Iterator[str]:
    """The same with a model that has a chat template."""
    with serving(chat_player(), tmp_path) as address:
        yield address


def test_a_page_that_runs_the_model_in_the_browser_is_served_without_gradio(tmp_path: Path) -> None:
    player = Player(tiny_model(), byte_tokenizer(eos_token="<|endoftext|>"))
    with serving(player, tmp_path, "--browser") as address:
        served = {name: urlopen(address + name).read() for name in ("index.html", "model.bin")}
    assert served == static_page(tmp_path / "tiny")


@contextmanager
def serving(player: Player, folder: Path, *options: str) -> Iterator[str]:
    """`minigpt playground` with a player's model in another process; gives its address."""
    player.model.save_pretrained(folder / "tiny")
    player.tokenizer.save_pretrained(folder / "tiny")
    with serving_folder(folder / "tiny", *options) as address:
        yield address


@contextmanager
def serving_folder(model: Path, *options: str) -> Iterator[str]:
    """The same with a model in a folder."""
    if "--browser" not in options and importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    log_file = model.with_name(f"{model.name}.log")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "minigpt", "playground", "--model", str(model), "--port", str(port)]
    words += options
    with log_file.open("w") as log:
        server = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
    try:
        printed = wait_for(lambda: re.search(r"playground: (http\S+)", log_file.read_text()) or server.poll())
        assert isinstance(printed, re.Match), log_file.read_text()
        yield printed[1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium("--window-size=1280,1400") as chrome:
        yield chrome


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


@pytest.mark.slow
def test_a_visitor_switches_marks_on_and_off_and_sees_the_sources_of_copies(
    tiny_run: list[str], train_here: Callable[[list[str]], int], text_file: Path, tmp_path: Path, browser: Any
) -> None:
    def page(expression: str) -> Any:
        return browser.execute_script(f"const all = s => [...document.querySelectorAll(s)]; return {expression}")

    def press_switch() -> None:
        browser.find_element("css selector", "#mark_copies input").click()

    def marks() -> list[str]:
        return page("all('#marked mark').map(e => e.textContent)")

    cache = tmp_path / "new cache"
    assert train_here([*tiny_run, "--block_size", "64", "--cache_dir", str(cache)]) == 0
    sentence = text_file.read_text().splitlines()[3]
    with serving_folder(tmp_path / "run") as address:
        browser.get(address)
        assert wait_for(lambda: "builds an index" in page("(all('#mark_copies')[0] || {}).innerText || ''"))
        browser.find_element("css selector", "#prompt textarea").send_keys(sentence)
        press_switch()
        assert wait_for(lambda: page("all('#marked .marked').length"))
        browser.find_element("id", "generate").click()
        player = Player(load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run"))
        *_, (written, ids) = player.generate("test", sentence, Sampling(100, temperature=0.8, top_k=50), seed=0)
        marker = CopyMarker(tmp_path / "run", player.tokenizer)
        list(marker.build())
        copies = MarkedText(marker).copies(ids)
        assert wait_for(lambda: page("all('#marked .marked')[0].textContent") == written)
        assert wait_for(lambda: marks() == [copy.text for copy in copies])
        sources = page("all('#marked .copies li').map(e => e.textContent)")
        assert [source.partition(" tokens")[0] for source in sources] == [f"1{copies[0].tokens}"]
        press_switch()
        assert wait_for(lambda: page("(all('#text textarea')[0] || {}).value") == written)
        assert not marks()
        press_switch()
        assert wait_for(marks)
        assert "builds an index" not in page("all('#mark_copies')[0].innerText")

    for manifest in cache.glob("*/manifest.json"):
        manifest.unlink()
    with serving_folder(tmp_path / "run") as address:
        browser.get(address)
        assert wait_for(lambda: "was trained on is not in" in page("(all('#mark_copies')[0] || {}).innerText || ''"))
        assert page("all('#mark_copies input')[0].disabled")
    player = Player(tiny_model(), byte_tokenizer(eos_token="<|endoftext|>"))
    with serving(player, tmp_path) as address:  # a model without a run
        browser.get(address)
        assert wait_for(lambda: page("all('#text textarea').length"))
        assert not page("all('#mark_copies').length")


@pytest.mark.slow
def test_a_visitor_chats_and_repeats_undoes_and_clears_without_a_second_one(chat_address: str, browser: Any) -> None:
    def page(expression: str) -> Any:
        return browser.execute_script(f"const all = s => [...document.querySelectorAll(s)]; return {expression}")

    def shown() -> list[str]:
        return page("all('#chat .message-content').map(e => e.textContent)")

    def is_idle() -> bool:
        return page("all('#chat_stop')[0].disabled && !all('#chat_clear')[0].disabled")

    def press(name: str) -> None:
        browser.find_element("id", f"chat_{name}").click()

    def type_question(text: str) -> None:
        textarea = browser.find_element("css selector", "#question textarea")
        textarea.send_keys(text)
        assert wait_for(lambda: box().endswith(text))
        textarea.send_keys("\n")

    def box() -> str:
        return page("all('#question textarea')[0].value")

    def content(conversation: Conversation) -> list[str]:
        return [message["content"].strip() for message in conversation.messages]

    player = chat_player()
    sampling = Sampling(100, temperature=0.8, top_k=50, top_p=1)  # as the sliders are
    mine = chat(player)

    browser.get(chat_address)
    assert wait_for(lambda: page("all('#question textarea').length"))
    for seed, question in enumerate(("<b>why?</b> &amp;", "and then?")):
        mine.ask(question, sampling, seed)
        type_question(question)
        assert wait_for(lambda: is_idle() and readable(shown()) == readable(content(mine)))
        assert box() == ""

    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(chat_address)
    assert wait_for(lambda: page("all('#question textarea').length"))
    theirs = chat(player)
    theirs.ask("hello", sampling, 0)
    type_question("hello")
    assert wait_for(lambda: is_idle() and readable(shown()) == readable(content(theirs)))
    browser.switch_to.window(first)

    del mine.messages[-1]
    mine.answer(sampling, 2)
    press("again")
    assert wait_for(lambda: is_idle() and readable(shown()) == readable(content(mine)))
    mine.undo()
    press("undo")
    assert wait_for(lambda: readable(shown()) == readable(content(mine)))
    assert wait_for(lambda: box() == "and then?")
    type_question("x" * 200)
    problem = wait_for(lambda: page("(all('#chat_problem')[0] || {}).innerText"))
    assert problem.strip().endswith("ask a shorter question")
    assert wait_for(lambda: box().startswith("and then?xx"))  # the question is not lost
    assert readable(shown()) == readable(content(mine))
    press("clear")
    assert wait_for(lambda: shown() == [])
    browser.switch_to.window(browser.window_handles[1])
    assert readable(shown()) == readable(content(theirs))


def readable(texts: list[str]) -> list[str]:
    """Texts without the characters that a page changes."""
    return ["".join(character for character in text if character.isprintable() and character != " ") for text in texts]
