"""The command line ``fxpass``: one command to a request, an answer as text or as JSON, an exit code."""

from .main import main

__all__ = ["main"]
