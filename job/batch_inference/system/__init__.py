"""The operating system: CPUs that a process may use, and child processes that may die.

Nothing here knows of images, stores or Ray.
"""
