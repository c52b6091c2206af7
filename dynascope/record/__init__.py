"""The record of a run: write it, read it, follow it, export it."""

from dynascope.record.model import Event, Finding, RecordError, Series, Severity
from dynascope.record.piece import Piece
from dynascope.record.reader import Record, open_record
from dynascope.record.writer import RecordWriter

__all__ = ["Event", "Finding", "Piece", "Record", "RecordError", "RecordWriter", "Series", "Severity", "open_record"]
