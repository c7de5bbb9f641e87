"""What the GPU path is worth: steps beside the bandwidth bound, beside transformers' own, and pairs on one GPU."""

from .parts import Part, failures, run_parts
from .suite import FULL, QUICK, Extent, measure_gpu, part_names
from .tables import gpu_tables

__all__ = ["FULL", "QUICK", "Extent", "Part", "failures", "gpu_tables", "measure_gpu", "part_names", "run_parts"]
