"""XLA's flags for tests: tiny programs take longer to optimize than to run as they come."""

import importlib.metadata

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
# Before 0.12, jax's CPU compiler can still write loops out without MLIR, in half the time.
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 12):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
