"""What of a TensorBoard log may others see? Curves and samples; not the options, which name folders, nor the host."""

import io
import re
from pathlib import Path

PRIVATE_TAG = "arguments/"
_HOST = re.compile(r"(events\.out\.tfevents\.\d+)\..*\.(\d+\.\d+)$")


def public_name(name: str) -> str:
    """The name of an event file without the name of the machine that wrote it."""
    return _HOST.sub(r"\1.\2", name)


def public_content(path: Path) -> bytes:
    """An event file without the run's options. A record that is cut off at the end is left out."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = io.BytesIO()
    writer = RecordWriter(kept)
    for record in RawEventFileLoader(str(path)).Load():
        if not any(value.tag.startswith(PRIVATE_TAG) for value in Event.FromString(record).summary.value):
            writer.write(record)
    return kept.getvalue()
