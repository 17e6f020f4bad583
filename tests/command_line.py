"""The command line in this process."""

import sys

import sparseswaps.cli


def run(*words: object) -> int:
    """The exit code of one command."""
    before = sys.argv
    sys.argv = ["sparseswaps", *map(str, words)]
    try:
        sparseswaps.cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
