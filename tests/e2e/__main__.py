"""Build what the end-to-end tests need, the cluster's images and the job's image, side by side.

The first time, one mostly compiles and the other mostly downloads.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

COMMANDS = (("tests.e2e.cluster", "build"), ("tests.e2e.image",))


def main() -> int:
    """Run both and return 0, or the exit status of the first that fails; the other is interrupted then."""
    running = [subprocess.Popen([sys.executable, "-m", *command]) for command in COMMANDS]
    try:
        while True:
            ended = [process.poll() for process in running]
            failed = [status for status in ended if status]
            if failed or None not in ended:
                return failed[0] if failed else 0
            time.sleep(0.2)
    finally:
        for process in running:
            if process.poll() is None:
                # As Ctrl-C does, so that it ends what it has started.
                process.send_signal(signal.SIGINT)
                process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
