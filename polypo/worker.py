"""A process that accelerate starts for a command: python -m polypo.worker COMMAND ..."""

import ctypes
import importlib
import os
import signal
import sys

from . import LAUNCHER, mistakes_told

PR_SET_PDEATHSIG = 1  # of prctl


def end_with_launcher() -> None:
    """Has Linux end this process when the program that started it is killed.

    A training would go on alone, and write into its folder beside one that was told to go on there.
    """
    launcher = int(os.environ.get(LAUNCHER, 0))
    # Launchers that have processes of their own in between are left alone.
    if sys.platform == "linux" and os.getppid() == launcher:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            sys.exit("The program that started this process was ended meanwhile.")


if __name__ == "__main__":
    end_with_launcher()
    command, *argv = sys.argv[1:]
    with mistakes_told():
        importlib.import_module(f"trainers.cli.{command}").main(argv)
