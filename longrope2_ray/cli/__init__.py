"""The command ``longrope2``."""

from longrope2_ray.cli.command_line import main

__all__ = ["main"]
