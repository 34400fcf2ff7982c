"""``python -m batch_inference``."""

from batch_inference.cli import main

main()
