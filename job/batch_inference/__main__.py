"""The entry point of ``batch-inference`` and of ``python -m batch_inference``."""

from __future__ import annotations

import sys
from importlib import import_module

#: Commands that the chart's pods run. They are hidden from ``--help`` and start without the command line's imports, which take ten
#: times as long and four times the memory.
POD_COMMANDS = {
    "prestop": "batch_inference.kubernetes.prestop",
    "schedule": "batch_inference.kubernetes.schedule",
}


def main() -> None:
    """Run the command that the program's arguments name."""
    if module := POD_COMMANDS.get("".join(sys.argv[1:2])):
        raise SystemExit(import_module(module).main(sys.argv[2:]))
    from batch_inference.cli.app import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
