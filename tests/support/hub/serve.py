"""Serve folders as repositories of a local Hub, until interrupted.

python -m tests.support.hub.serve org/name=FOLDER ... [--bandwidth BYTES_PER_SECOND]
                                  [--latency SECONDS]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path

from tests.support.hub.server import LocalHub


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="org/name=FOLDER")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES_PER_SECOND")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    given = parser.parse_args()
    # A termination ends it as an interruption does, and the folder goes with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        hub = LocalHub(Path(folder) / "storage")
        for model in given.models:
            id, _, source = model.partition("=")
            if not source or not Path(source).is_dir():
                parser.error(f"{model}: not org/name=FOLDER with an existing folder")
            hub.add_model(id, Path(source))
        hub.limit_bandwidth(given.bandwidth, given.latency)
        hub.start()
        for name, value in hub.environment(Path(folder) / "home").items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            hub.stop()


if __name__ == "__main__":
    main()
