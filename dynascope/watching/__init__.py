"""Attaching probes to a training run: context manager, launcher, framework callbacks."""

from dynascope.watching.attach import Watch, watch

__all__ = ["Watch", "watch"]
