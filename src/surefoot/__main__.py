"""The command ``surefoot``, also as ``python -m surefoot``."""

import signal


def main() -> None:
    """Runs the command line; see `surefoot.cli.main.main`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until its imports are done: no traceback out of one
    from surefoot.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
