"""The cluster from a shell: `python -m tests.e2e.cluster COMMAND`, in the repository's root."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from tests.e2e.cluster.cache import prune
from tests.e2e.cluster.cluster import Cluster, build
from tests.e2e.cluster.engines import engine
from tests.e2e.cluster.images import base_image
from tests.e2e.cluster.process import CommandError, say
from tests.e2e.cluster.programs import REPOSITORY, compiled


def parser() -> argparse.ArgumentParser:
    """Describes the commands."""
    root = argparse.ArgumentParser(prog="python -m tests.e2e.cluster", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make everything that is slow, into the cache")
    commands.add_parser("base", help="make sure that FROM debian:bookworm-slim works")
    commands.add_parser("prune", help="remove from the cache what nobody wanted for two weeks")
    compile_one = commands.add_parser("compile", help="compile one program (helm4, say) and print its path")
    compile_one.add_argument("program")
    named = {
        "up": "make the cluster, or keep the one that is up",
        "down": "remove the cluster",
        "load": "copy an image into the cluster's node",
        "env": "print the variables for kubectl, helm and the engine, for a shell to evaluate",
        "evidence": "write logs, events and objects to a folder",
    }
    for command, text in named.items():
        one = commands.add_parser(command, help=text)
        one.add_argument("name", help="the cluster")
        one.add_argument("--kubeconfig", type=Path, help="default: build/cluster/NAME/kubeconfig")
        if command == "up":
            one.add_argument("--gpus", type=int, default=2, help="GPUs that the node claims to have (default: 2)")
        if command == "load":
            one.add_argument("image", help="the image with its registry: localhost/batch-inference:dev")
        if command in ("up", "evidence"):
            one.add_argument("--evidence", type=Path, help="default: build/cluster/NAME/evidence")
    return root


def main(arguments: argparse.Namespace) -> None:
    """Carries out a command."""
    if arguments.command == "build":
        build()
    elif arguments.command == "base":
        print(base_image())
    elif arguments.command == "prune":
        for folder in prune():
            print(folder)
    elif arguments.command == "compile":
        print(compiled(arguments.program))
    else:
        folder = REPOSITORY / "build" / "cluster" / arguments.name
        cluster = Cluster(arguments.name, (arguments.kubeconfig or folder / "kubeconfig").absolute())
        if arguments.command == "up":
            cluster.up(arguments.gpus, arguments.evidence or folder / "evidence")
        elif arguments.command == "down":
            cluster.down()
        elif arguments.command == "load":
            cluster.load_image(arguments.image)
        elif arguments.command == "env":
            for name, value in {**engine().env, **cluster.env}.items():
                print(f"export {name}={shlex.quote(value)}")
        elif arguments.command == "evidence":
            cluster.evidence(arguments.evidence or folder / "evidence")


if __name__ == "__main__":
    # A cancelled run must not leave compilers or half a cluster behind: leave through the same doors as Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(parser().parse_args())
    except CommandError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
