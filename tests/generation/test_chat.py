"""Laws of `minigpt chat`: its commands, Ctrl-C, files, a pipe, and a session in a pseudo terminal."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.cli import main
from minigpt.data.rows import MESSAGES
from minigpt.generation.chat_session import COMMANDS, ChatSession
from minigpt.generation.conversation import Conversation
from minigpt.generation.interactive import ContinuationPrinter
from minigpt.generation.sampling import Sampling
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support import fork_server
from support.tiny import byte_tokenizer, tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
WARM = Sampling(12, temperature=1.0)
ESCAPE = "\033"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model() -> MiniGPTForCausalLM:
    return tiny_model(max_position_embeddings=1024)


@pytest.fixture(scope="module")
def folder(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def session(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Callable[..., ChatSession]:
    """A session with questions and commands already taken."""

    def start(*texts: str, sampling: Sampling = WARM) -> ChatSession:
        session = ChatSession(Conversation(model, tokenizer, "sys"), sampling, seed=3)
        for text in texts:
            session.take(text)
        return session

    return start


def last_answer(session: ChatSession) -> str:
    return session.conversation.messages[-1]["content"]


def test_answers_are_those_of_the_library_with_consecutive_seeds(
    session: Callable[..., ChatSession], model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = Conversation(model, tokenizer, "sys")
    for number, question in enumerate("abc"):
        conversation.ask(question, WARM, seed=3 + number)
    assert session("a", "b", "c").conversation.messages == conversation.messages


def test_again_replaces_the_last_answer_and_undo_forgets_it(session: Callable[..., ChatSession]) -> None:
    first, again, twice = session("a", "b"), session("a", "b", "/again"), session("a", "b", "/again", "/again")
    assert first.conversation.messages[:-1] == again.conversation.messages[:-1] == twice.conversation.messages[:-1]
    assert len({last_answer(first), last_answer(again), last_answer(twice)}) == 3
    for detour in (("x", "/undo"), ("x", "/again", "/undo"), ("/undo", "b", "x", "/undo")):
        assert session("a", "b", *detour).conversation.messages == first.conversation.messages
    with pytest.raises(UserError, match="temperature=0 always gives the same answer"):
        session("a", "/again", sampling=Sampling(4, temperature=0))


@pytest.mark.parametrize("before", [("a", "b"), ("a", "b", "/again", "/system other"), ("☺ \\ \n two lines",)])
def test_a_loaded_conversation_goes_on_as_the_saved_one(
    session: Callable[..., ChatSession], before: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    saved = session(*before, f"/save {path}")
    loaded = session("something else", f"/load {path}")
    assert loaded.conversation.messages == saved.conversation.messages
    saved.take("next")
    loaded.take("next")
    assert loaded.conversation.messages == saved.conversation.messages
    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert MESSAGES.parse(row, "row").messages == saved.conversation.messages[:-2]


def test_save_writes_nothing_over_a_file_and_nothing_without_an_answer(
    session: Callable[..., ChatSession], tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    with pytest.raises(UserError, match="no answer yet"):
        session(f"/save {path}")
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UserError, match=r"chat\.jsonl exists; give another name or remove it first"):
        session("a", f"/save {path}")
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{}",
        '{"messages": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "bot", "content": "a"}]}',
        '{"messages": [{"role": ["user"], "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": 3}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}]}\n' * 2,
        "[" * 100_000,
    ],
)
def test_load_refuses_what_is_no_conversation_and_keeps_the_present_one(
    session: Callable[..., ChatSession], content: str, tmp_path: Path
) -> None:
    (tmp_path / "chat.jsonl").write_text(content)
    present = session("a")
    messages = present.conversation.messages.copy()
    with pytest.raises(UserError, match=r"chat\.jsonl"):
        present.take(f"/load {tmp_path / 'chat.jsonl'}")
    assert present.conversation.messages == messages


def test_a_cut_answer_and_the_first_dropped_turn_are_noted(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(max_position_embeddings=64, initializer_range=1e-9)
    session = ChatSession(Conversation(model, tokenizer), Sampling(30, temperature=1.0), seed=0)
    for length, note in ((1, "cut off: max_new_tokens=30"), (38, "cut off: the context of 64 tokens is full")):
        session.take("x" * length)
        assert note in capsys.readouterr().err
    session.take("/clear")
    for _ in range(5):
        session.take("x" * 9)
    assert capsys.readouterr().err.count("the oldest turns are dropped") == 1


def test_clear_keeps_only_the_system_prompt(session: Callable[..., ChatSession]) -> None:
    assert session("a", "/clear", "b").conversation.messages == session("b").conversation.messages
    assert session("/system one\ntwo", "a", "/clear").conversation.messages == [
        {"role": "system", "content": "one\ntwo"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/udno", "unknown command /udno; did you mean /undo"),
        ("/usr/bin is what", "unknown command /usr/bin; /help lists"),
        ("/undo that", "/undo takes nothing after it, but 'that' follows"),
        ("/save", "/save needs a name"),
    ],
)
def test_a_mistaken_command_is_named_and_not_sent(
    session: Callable[..., ChatSession], text: str, message: str
) -> None:
    present = session("a")
    messages = present.conversation.messages.copy()
    with pytest.raises(UserError, match=re.escape(message)):
        present.take(text)
    assert present.conversation.messages == messages
    present.take(f" {text}")
    assert present.conversation.messages[-2] == {"role": "user", "content": text}


@pytest.mark.parametrize("tokens", [0, 7])
def test_ctrl_c_keeps_the_part_that_was_printed(
    session: Callable[..., ChatSession],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put = ContinuationPrinter.put

    def interrupted(printer: ContinuationPrinter, value: object) -> None:
        if len(printer.token_ids) == tokens:
            raise KeyboardInterrupt
        put(printer, value)

    present, whole = session("a"), session("a", "b")
    again = session("a")
    monkeypatch.setattr(ContinuationPrinter, "put", interrupted)
    messages = present.conversation.messages.copy()
    capsys.readouterr()
    present.streams = again.streams = True
    present.take("b")
    part = capsys.readouterr().out.strip()
    kept = [{"role": "user", "content": "b"}, {"role": "assistant", "content": part}] if part else []
    assert present.conversation.messages == messages + kept
    assert last_answer(whole).startswith(part)
    assert bool(part) == bool(tokens)
    again.take("/again")
    if not tokens:
        assert again.conversation.messages == messages


def test_ctrl_c_at_the_prompt_does_not_end_the_session(
    session: Callable[..., ChatSession], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present, lines = (
        session(),
        iter([KeyboardInterrupt, "a", "/nonsense", "b\\", KeyboardInterrupt, "c", EOFError, "d"]),
    )

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    present.run_at_keyboard()
    assert present.conversation.messages == session("a", "c").conversation.messages
    assert capsys.readouterr().err.count("Ctrl-D ends the session)") == 2


def test_a_pipe_gets_the_answers_and_nothing_else(
    folder: Path,
    session: Callable[..., ChatSession],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = session("one\ntwo", "b", "/again", "c").conversation.messages
    answers = [message["content"] for message in expected if message["role"] == "assistant"]
    other = last_answer(session("one\ntwo", "b"))
    lines = "one\\\ntwo\n\nb\n/system\n/again\nc"
    capsys.readouterr()
    chat(monkeypatch, folder, lines, "--max_new_tokens", "12", "--temperature", "1", "--top-p", "1", "--seed", "3")
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in (answers[0], other, *answers[1:]))
    assert ESCAPE not in printed.err


def chat(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str, *options: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main(["chat", "--model", str(folder), "--system_prompt", "sys", *options])


@pytest.mark.parametrize("lines", ["x" * 2000, "/agian"])
def test_a_line_of_a_pipe_that_fails_is_one_line_and_exit_code_2(
    folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        chat(monkeypatch, folder, f"{lines}\nb\n")
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)


def test_a_model_without_a_chat_template_is_one_line_and_exit_code_2(
    model: MiniGPTForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path)
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        chat(monkeypatch, tmp_path, "a\n")
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "has no chat template" in error
    assert "minigpt generate --interactive" in error


IN_TERMINAL = """
import os, sys
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)  # becomes the controlling terminal, so that it can send Ctrl-C
for number in (0, 1, 2):
    os.dup2(terminal, number)
os.close(terminal)
from minigpt.cli import main
main(sys.argv[2:])
"""


@contextmanager
def terminal(folder: Path, program: Path, *options: str, **environment: str) -> Iterator[Callable[[str, str], str]]:
    """`minigpt chat` as a process in a pseudo terminal; the function types and reads until a pattern comes."""
    master, slave = pty.openpty()
    program.write_text(IN_TERMINAL)
    words = [str(program), os.ttyname(slave), "chat", "--model", str(folder), *options]
    process = fork_server.start([sys.executable, *words], {**os.environ, "TERM": "xterm", **environment})

    def type_and_read(text: str, expected: str) -> str:
        os.write(master, text.encode())
        shown, end = b"", time.monotonic() + 25
        while not re.search(expected.encode(), shown, re.DOTALL):
            assert select.select([master], [], [], max(0, end - time.monotonic()))[0], (shown, process.stderr())
            shown += os.read(master, 4096)
        return shown.decode(errors="replace")

    try:
        yield type_and_read
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)
        os.close(slave)


def test_a_session_in_a_terminal_has_colors_history_and_ctrl_c(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    options = ("--max_new_tokens", "2000", "--seed", "1")
    with terminal(folder, tmp_path / "program.py", *options) as type_and_read:
        prompt = rf"{ESCAPE}\[32m> {ESCAPE}\[0m"  # what is typed before it may be lost
        type_and_read("", prompt)
        for line in ("hi", f"{ESCAPE}[A"):  # the arrow brings the line before it back
            type_and_read(f"{line}\n", r"hi\r\n.{40}")
            type_and_read("\x03", f"the answer so far is kept.*{prompt}")
        type_and_read("/agian\n", f"did you mean /again.*{prompt}")
        type_and_read(f"/save {saved}\n", f"saved in.*{prompt}")
        type_and_read("\x04", "")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hi", "hi"]
    assert all(message["content"] for message in messages)


def test_a_session_with_no_color_has_no_colors(folder: Path, tmp_path: Path) -> None:
    with terminal(folder, tmp_path / "program.py", NO_COLOR="1") as type_and_read:
        shown = type_and_read("", "> ") + type_and_read("/help\n", "Put a space before.*> ")
        shown += type_and_read("/exit\n", "")
    assert not re.search(rf"{ESCAPE}\[[0-9;]*m", shown)
    assert all(word in shown for word in COMMANDS)
