"""DualPipe: bidirectional pipeline parallelism for PyTorch on a native engine."""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from dualpipe_ext._native import load_extension, runs_as_command

__version__ = "0.1.0"

if not runs_as_command():
    load_extension()

    from dualpipe_ext import schedule, testing
    from dualpipe_ext._C import InternalError, PipelineError, ScheduleError
    from dualpipe_ext._cuda import reserve_queues
    from dualpipe_ext._random import microbatch_seed
    from dualpipe_ext.config import DualPipeConfig
    from dualpipe_ext.dualpipe import DualPipe, DualPipeV
    from dualpipe_ext.p2p import set_p2p_tensor_dtype, set_p2p_tensor_shapes
    from dualpipe_ext.pipeline import Pipeline
    from dualpipe_ext.stats import StepStatistics, TraceEvent
    from dualpipe_ext.training import TrainingWrapper, setup_dual_pipe
    from dualpipe_ext.weight_grad import WeightGradStore, WeightSplitReport

    reserve_queues()

__all__ = [
    "DualPipe",
    "DualPipeConfig",
    "DualPipeV",
    "InternalError",
    "Pipeline",
    "PipelineError",
    "ScheduleError",
    "StepStatistics",
    "TraceEvent",
    "TrainingWrapper",
    "WeightGradStore",
    "WeightSplitReport",
    "__version__",
    "microbatch_seed",
    "schedule",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
    "setup_dual_pipe",
    "testing",
]
