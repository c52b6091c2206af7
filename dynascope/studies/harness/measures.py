"""What claims of several studies measure of a record."""

from dynascope.record import Record


def last_mean(record: Record, name: str, num: int) -> float:
    """Mean of a series over its last `num` looks, and over its other axes.

    Raises KeyError where the record does not have it.

    >>> last_mean(record, "policy/entropy", 10)
    """
    return float(record[name].values[-num:].mean())
