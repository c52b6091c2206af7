"""`python -m dynascope`, the same as `dynascope`."""

from dynascope.cli import main

main()
