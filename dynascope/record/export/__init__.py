"""A record in the formats of other tools."""

from dynascope.record.export.conversion import Format, export

__all__ = ["Format", "export"]
