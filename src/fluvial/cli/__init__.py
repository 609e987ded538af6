"""The command line: parses, calls the library, prints. Errors are one line and exit code 2; --debug shows the rest."""

from __future__ import annotations

# Importing a module of commands adds them to the application: in the order of a first acquaintance, not the alphabet's.
from fluvial.cli import train  # isort: skip
from fluvial.cli import autoencoder  # isort: skip
from fluvial.cli import sample  # isort: skip
from fluvial.cli import pairs  # isort: skip
from fluvial.cli import straighten  # isort: skip
from fluvial.cli import distill  # isort: skip
from fluvial.cli import evaluate  # isort: skip
from fluvial.cli import diagnose  # isort: skip
from fluvial.cli import unclip  # isort: skip
from fluvial.cli import cascade  # isort: skip
from fluvial.cli.app import app, main  # isort: skip

__all__ = [
    "app",
    "autoencoder",
    "cascade",
    "diagnose",
    "distill",
    "evaluate",
    "main",
    "pairs",
    "sample",
    "straighten",
    "train",
    "unclip",
]
