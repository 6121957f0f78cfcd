"""Running one generation on several ranks."""

from quantkit_runtime.parallel.cfg import CfgParallel

__all__ = ["CfgParallel"]
