"""The `segue` command."""

import sys


def main() -> None:
    """Ctrl-C ends it without a traceback, even while it is still loading."""
    try:
        from deploy.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
