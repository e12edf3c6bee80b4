"""Which ``TrainingArguments`` are accepted: whatever is not honoured is refused by name."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["REFUSED", "accepted", "recomputes"]

_WRAPS = "it wraps or places the model, which the pipeline does"
_DDP = "nothing is wrapped in DistributedDataParallel"
_RECOMPUTED = (
    "recomputing is on or off: each stage as "
    "DualPipeConfig(memory_optimization='activation_checkpoint') does it"
)
_RECOMPUTING = ("activation_checkpointing", "gradient_checkpointing")  # newer releases, older ones

# Settings that must be off, and why. Some exist only in certain releases of transformers.
REFUSED = {
    "fp16": "gradients are not scaled here; use bf16=True",
    "fp16_full_eval": "the model is evaluated in the type that it is trained in",
    "bf16_full_eval": "the model is evaluated in the type that it is trained in",
    "deepspeed": _WRAPS,
    "fsdp": _WRAPS,
    "parallelism_config": _WRAPS,
    "mp_parameters": _WRAPS,
    "tpu_num_cores": "pipelines run on CPUs and GPUs",
    "tpu_metrics_debug": "pipelines run on CPUs and GPUs",
    "use_mps_device": "pipelines run on CPUs and GPUs",
    "torch_compile": "stages are not compiled",
    "torchdynamo": "stages are not compiled",
    "jit_mode_eval": "stages are not compiled",
    "use_liger_kernel": "it replaces forwards of a model that is cut already; apply it before",
    "neftune_noise_alpha": "its noise would be another one in each copy of the embedding",
    "label_smoothing_factor": "the loss is the model's own, micro-batch by micro-batch",
    "activation_checkpointing_kwargs": _RECOMPUTED,
    "gradient_checkpointing_kwargs": _RECOMPUTED,
    "auto_find_batch_size": "ranks do not run out of memory together",
    "torch_empty_cache_steps": "caches are not emptied between steps",
    "enable_jit_checkpoint": "ranks are not told to stop at the same step",
    "save_on_each_node": "one node writes, to a file system that all of them share",
    "use_legacy_prediction_loop": "evaluation runs in the usual loop",
    "debug": "its hooks watch the model in one piece",
    "ddp_find_unused_parameters": _DDP,
    "ddp_bucket_cap_mb": f"{_DDP}; use DualPipeConfig(bucket_bytes=...)",
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
}
_OPTIMIZERS = ("lomo", "adalomo")  # they update within the backward pass


def accepted(args: Any) -> Any:
    """Returns a copy of the arguments without what this trainer takes care of itself.

    Raises:
        ValueError: a setting is not honoured; names it.
    """
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise _refusal(name, getattr(args, name), reason)
    if getattr(args, "past_index", -1) >= 0:
        raise _refusal("past_index", args.past_index, "stages keep no state between batches")
    if getattr(args, "half_precision_backend", "auto") not in ("auto", "cpu_amp"):
        raise _refusal("half_precision_backend", args.half_precision_backend, "torch's is used")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise _refusal("accelerator_config", "dispatch_batches", "every rank reads the batches")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _OPTIMIZERS or optimizer.endswith("layerwise"):
        raise _refusal("optim", optimizer, "it updates before gradients are summed over mirrors")
    args = copy.copy(args)
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False  # its default depends on the kind of data
    for name in _RECOMPUTING:
        setattr(args, name, False)  # not by the model: the pipeline recomputes
    args._n_gpu = min(args._n_gpu, 1)
    return args


def recomputes(args: Any) -> bool:
    """Whether forwards are to be recomputed in the backward, under either name of the setting."""
    return any(getattr(args, name, False) for name in _RECOMPUTING)


def _refusal(name: str, value: Any, reason: str) -> ValueError:
    return ValueError(
        f"TrainingArguments({name}={value!r}) cannot be honoured by DualPipeTrainer: {reason}; "
        f"leave it out"
    )
