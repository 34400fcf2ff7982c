"""The command line: commands and their options, the live display, the tables and the verdict that it prints, and the demo.

A command only reads its options and prints; jobs run in `driver`.
"""
