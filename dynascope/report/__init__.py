"""What a record says, for the eyes: in the terminal, on a page, live in the browser."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynascope.report.charts import Chart, draw
    from dynascope.report.live import serve
    from dynascope.report.page import report
    from dynascope.report.terminal import print_findings, show, show_json

__all__ = ["Chart", "draw", "print_findings", "report", "serve", "show", "show_json"]

# Charts and servers are slow to import, and `dynascope show` needs neither.
_HOMES = {
    "Chart": "dynascope.report.charts",
    "draw": "dynascope.report.charts",
    "report": "dynascope.report.page",
    "serve": "dynascope.report.live",
    "print_findings": "dynascope.report.terminal",
    "show": "dynascope.report.terminal",
    "show_json": "dynascope.report.terminal",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynascope.report' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
