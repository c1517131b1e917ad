"""The playground's switch that marks what is copied from the training text, and the marked text."""

import html
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from minigpt.playground.copies import LEAST, CopyMarker, MarkedText
from minigpt.utils.errors import UserError

Update = dict[Any, Any]  # new values and properties, by component


class CopyMarks:
    """The components, made in the surrounding `gradio.Blocks`. The marked text takes the place of the box of `text`.

    Without a marker there are none. A text instead of it says why nothing can be marked.
    """

    def __init__(self, text: Any, marker: CopyMarker | str | None) -> None:
        self.text, self.marker = text, marker if isinstance(marker, CopyMarker) else None
        self.outputs: list[Any] = []
        if marker is None:
            return
        self.ids = gr.State([])  # of the text; the prompt may have changed since
        self.marked = gr.HTML(visible=False, container=True, padding=False, elem_id="marked")
        self.switch = gr.Checkbox(
            label="Mark what is copied from the training text",
            info=self._info() if self.marker else str(marker),
            interactive=self.marker is not None,
            elem_id="mark_copies",
        )
        self.note = gr.HTML(visible=False, elem_id="copies_note", elem_classes="caption")
        self.outputs = [self.ids, self.marked]
        outputs = [self.text, self.marked, self.switch, self.note]
        options = {"outputs": outputs, "show_progress": "hidden", "concurrency_limit": None}
        self.switch.input(self._switched, self.switch, **options, trigger_mode="always_last").then(
            self._show, self.ids, self.marked, show_progress="hidden"
        )

    def of_new_text(self, request: gr.Request) -> Callable[[list[int]], tuple[Any, ...]]:
        """A function from the ids of a growing text to the values of `outputs`."""
        if self.marker is None:
            return lambda ids: tuple(gr.skip() for _ in self.outputs)
        marker, text = self.marker, MarkedText(self.marker)
        return lambda ids: (ids, text.html(ids) if request.session_hash in marker.visitors else gr.skip())

    def _info(self) -> str:
        """What the marks mean, and what they cost."""
        assert self.marker is not None
        return f"{LEAST} or more tokens in a row, the prompt included. {self.marker.cost}"

    def _switched(self, is_on: bool, request: gr.Request) -> Iterator[Update]:
        """Build the index if nobody has, then show the marks instead of the plain text, or the other way round."""
        assert self.marker is not None
        if not is_on:
            self.marker.visitors.discard(request.session_hash)
            yield {self.text: gr.update(visible=True), self.marked: gr.update(visible=False), self.note: _note("")}
            return
        try:
            for progress in self.marker.build():
                yield {self.note: _note(progress)}
        except UserError as error:
            yield {self.switch: False, self.note: _note(str(error))}
            return
        self.marker.visitors.add(request.session_hash)
        yield {
            self.text: gr.update(visible=False),
            self.marked: gr.update(visible=True),
            self.switch: gr.update(info=self._info()),
            self.note: _note(""),
        }

    def _show(self, ids: list[int], request: gr.Request) -> Any:
        """The marks of the text that was there before the switch was on."""
        if self.marker is None or request.session_hash not in self.marker.visitors:
            return gr.skip()
        return MarkedText(self.marker).html(ids)


def _note(text: str) -> Any:
    return gr.update(value=html.escape(text), visible=bool(text))
