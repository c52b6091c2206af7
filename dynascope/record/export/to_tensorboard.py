"""TensorBoard: event files of scalars; `tensorboard --logdir OUTPUT` shows them.

An array becomes one tag for each of its numbers (`attention/entropy/layer=0/head=1`). TensorBoard keeps float32.
When several processes wrote the record, each has its own run (`rank-00000`, …) in the folder.
"""

from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dynascope.record.export.rows import rows_by_process
from dynascope.record.reader import Record


def write(record: Record, output: Path, progress: Callable[[float], None]) -> None:
    """Write one event a step."""
    is_alone = len(record.ranks) == 1
    for title, rows in rows_by_process(record, progress):
        writer = EventFileWriter(str(output if is_alone else output / title))
        for row in rows:
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
            writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=scalars)))
        writer.close()
