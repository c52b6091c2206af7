"""What a record holds beside its series, as plain values for JSON."""

from dataclasses import asdict
from typing import Any

from dynascope.record.reader import Record


def contents(record: Record) -> dict[str, Any]:
    """Keys run (what run.json says), events and findings."""
    return {
        "run": record.config,
        "events": [asdict(event) for event in record.events],
        "findings": [asdict(finding) for finding in record.findings],
    }
