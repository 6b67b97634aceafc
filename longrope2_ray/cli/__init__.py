"""The command ``longrope2``."""

from longrope2_ray.cli.parser import main

__all__ = ["main"]
