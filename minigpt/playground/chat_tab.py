"""The playground's chat tab: a conversation with the model, one for each visitor."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from minigpt.data.chat import Messages
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.playground.player import Player
from minigpt.playground.views import problem_line, sampling_sliders
from minigpt.utils.errors import UserError

CHAT_CSS = """
#chat .top-panel {display: none} /* Gradio's button that clears the messages only */
#chat .message-content * {white-space: pre-wrap} /* keeps indentation */
#note {opacity: .75; font-size: .85em; padding: 0}
"""

Update = dict[Any, Any]  # new values and properties, by component


class ChatTab:
    """The components of the tab, made in the surrounding `gradio.Blocks`, and what its buttons do.

    `questions` are examples. The page of a visitor holds the turns: the messages without the system prompt.
    """

    def __init__(self, player: Player, questions: list[str]) -> None:
        self.player = player
        self.turns = gr.State([])
        self.answers = gr.State(0)  # how many the visitor asked for: each has a seed of its own
        with gr.Row():
            with gr.Column(scale=3):
                self.chat = gr.Chatbot(
                    show_label=False,
                    height=470,
                    placeholder="Ask the model something.",
                    render_markdown=False,  # the text as the model writes it
                    buttons=[],
                    elem_id="chat",
                )
                self.note = gr.HTML(visible=False, elem_id="note")
                self.problem = problem_line("chat_problem", visible=False)
                self.question = gr.Textbox(
                    show_label=False, placeholder="Your message", max_lines=8, submit_btn=True, elem_id="question"
                )
                with gr.Row():
                    self.again, self.undo, self.clear, self.stop = (
                        gr.Button(label, size="sm", min_width=60, interactive=False, elem_id=f"chat_{label.lower()}")
                        for label in ("Again", "Undo", "Clear", "Stop")
                    )
                if questions:
                    gr.Examples([[example] for example in questions], [self.question], label="Examples")
            with gr.Column(scale=2):
                self.system_prompt = gr.Textbox(
                    "", label="System prompt", lines=2, max_lines=8, elem_id="system_prompt"
                )
                self.sliders = sampling_sliders()
        self._connect()

    def _connect(self) -> None:
        inputs = [self.turns, self.answers, self.system_prompt, *self.sliders]
        shown = [self.chat, self.note, self.problem, self.question, self.again, self.undo, self.clear, self.stop]
        outputs = [self.turns, self.answers, *shown]
        # visitors wait for each other at the player's lock, where their questions are on the page already
        answering = {"outputs": outputs, "concurrency_limit": None, "show_progress": "hidden"}
        self.question.submit(self._ask, [self.question, *inputs], **answering)
        self.again.click(self._ask_again, inputs, **answering)
        self.undo.click(self._undo, self.turns, outputs, show_progress="hidden")
        self.clear.click(self._clear, None, outputs, show_progress="hidden")
        self.stop.click(self._stop, queue=False)

    def _ask(
        self, request: gr.Request, question: str, turns: Messages, answers: int, system_prompt: str, *sliders: float
    ) -> Iterator[Update]:
        """Answer a new question. It goes back into its box if there is no answer."""
        if question.strip():
            asked = [*turns, {"role": "user", "content": question}]
            for update in self._answer(request, asked, turns, answers, system_prompt, sliders):
                is_unanswered = update.get(self.turns) == turns
                yield self._with_question(update, question if is_unanswered else "")

    def _ask_again(
        self, request: gr.Request, turns: Messages, answers: int, system_prompt: str, *sliders: float
    ) -> Iterator[Update]:
        """Replace the last answer by another one."""
        if turns:
            yield from self._answer(request, turns[:-1], turns, answers, system_prompt, sliders)

    def _answer(
        self,
        request: gr.Request,
        asked: Messages,
        turns: Messages,
        answers: int,
        system_prompt: str,
        sliders: tuple[float, ...],
    ) -> Iterator[Update]:
        """Answer the question at the end of `asked`. Without an answer, the page goes back to `turns`."""
        visitor = _visitor(request)
        if visitor in self.player.running:
            return
        yield self._show(asked, running=True)
        conversation = Conversation(self.player.model, self.player.tokenizer, system_prompt.strip() or None)
        conversation.messages += asked
        problem, note = "", ""
        try:
            max_new_tokens, temperature, top_k, top_p, seed = sliders
            sampling = Sampling(int(max_new_tokens), temperature, int(top_k), top_p)
            for text in self.player.answer(visitor, conversation, sampling, int(seed) + answers):
                yield self._show([*asked, {"role": "assistant", "content": text}], running=True)
        except UserError as error:
            problem = str(error)
        except Exception:
            yield {**self._show(turns), self.turns: turns}
            raise  # Gradio shows that there was an error, and the terminal its traceback
        if (answer := conversation.messages[-1])["role"] == "assistant":
            turns = [*asked, answer]
        if dropped_turns := conversation.dropped_turns:
            first_turns = "first turn was" if dropped_turns == 1 else f"first {dropped_turns} turns were"
            note = f"The context is full: the {first_turns} dropped."
        yield {**self._show(turns, problem, note), self.turns: turns, self.answers: answers + 1}

    def _undo(self, request: gr.Request, turns: Messages) -> Update:
        """Remove the last question and answer; the question goes back into its box."""
        if not turns or _visitor(request) in self.player.running:
            return {self.turns: gr.skip()}
        *turns, question, _ = turns
        return {**self._with_question(self._show(turns), question["content"]), self.turns: turns}

    def _clear(self, request: gr.Request) -> Update:
        """Begin a new conversation."""
        if _visitor(request) in self.player.running:
            return {self.turns: gr.skip()}
        return {**self._show([]), self.turns: [], self.answers: 0}

    def _stop(self, request: gr.Request) -> None:
        self.player.stop(_visitor(request))

    def _show(self, turns: Messages, problem: str = "", note: str = "", *, running: bool = False) -> Update:
        """All that depends on the conversation. Buttons that would do nothing are off.

        Of updates that follow each other closely the page may apply the last one only, so each is complete.
        """
        edits = gr.update(interactive=bool(turns) and not running)
        return {
            # Gradio renders HTML also without Markdown
            self.chat: [message | {"content": html.escape(message["content"], quote=False)} for message in turns],
            self.note: gr.update(value=html.escape(note), visible=bool(note)),
            self.problem: gr.update(value=html.escape(problem), visible=bool(problem)),
            self.question: gr.update(interactive=not running, autofocus=not running),
            self.stop: gr.update(interactive=running),
            **dict.fromkeys((self.again, self.undo, self.clear), edits),
        }

    def _with_question(self, update: Update, text: str) -> Update:
        return {**update, self.question: update[self.question] | {"value": text}}


def _visitor(request: gr.Request) -> str:
    """The name of the visitor's chat for the player, which may generate for the text tab at the same time."""
    return f"chat of {request.session_hash}"
