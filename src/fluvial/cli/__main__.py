"""`python -m fluvial.cli`, for launchers that want a module."""

from fluvial.cli import main

main()
