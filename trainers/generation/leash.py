"""Runs a command until it ends or standard input closes, which it does when the process that started this one dies.

    python leash.py COMMAND...

It is run as a file, imports nothing else, and takes all processes of the command with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 20  # seconds to end in after SIGTERM


def end(group: int, child: subprocess.Popen) -> None:
    """Asks all processes of the group to end, and ends those that do not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        os.killpg(group, signal.SIGKILL)


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        sys.stdin.buffer.read()
        end(child.pid, child)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(child.pid, child)  # what it left behind
    return code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the thread still reads
