"""Running one generation on several ranks."""

from quantkit_runtime.parallel.call import ParallelPipeline
from quantkit_runtime.parallel.cfg import CfgParallel
from quantkit_runtime.parallel.mesh import make_mesh, parallel_call

__all__ = ["CfgParallel", "ParallelPipeline", "make_mesh", "parallel_call"]
