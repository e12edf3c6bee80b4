"""Settings of a pipeline."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

__all__ = ["DualPipeConfig"]

_OTHER_NAMES = {"num_chunks": "num_microbatches", "num_partitions": "num_stages"}

BalanceCriterion = Literal["parameters", "memory", "time"]
Balance = BalanceCriterion | Sequence[int]
MemoryOptimization = Literal["none", "activation_checkpoint", "offload"]
MirrorInit = Literal["broadcast", "check", "none"]
OverlapStrategy = Literal["full", "none"]
Transport = Literal["auto", "host", "nccl", "copy"]


@dataclass(frozen=True, kw_only=True)
class DualPipeConfig:
    """How the engine runs a pipeline. Must be the same on every rank.

    Attributes:
        num_stages: the number of stages of the whole model; a pipeline with a different number is
            an error. 0: whatever the schedule has on the given number of ranks.
        num_microbatches: the default of ``num_chunks`` in ``step``; 0: ``num_chunks`` is required
            (:class:`~dualpipe_ext.TrainingWrapper` uses twice the number of ranks).
        schedule: the default of pipelines that are given no schedule.
        balance: how an adapter splits a whole model: evening out ``"parameters"``, ``"memory"`` or
            ``"time"`` over the ranks, or by the number of layers of each stage
            (:meth:`dualpipe_ext.adapters.ModelAdapterBase.partition`).
        overlap_strategy: ``"full"``; or ``"none"``, for comparison and debugging: receives are
            posted where they are used, weight gradients are computed together with input gradients,
            the two halves of a pair run one after the other, and mirrored gradients are summed
            after the step, whatever ``lookahead``, ``split_weight_gradients`` and
            ``use_overlapped`` say.
        memory_optimization: what to do about activations that are kept for a backward:
            ``"activation_checkpoint"`` keeps only the inputs of each layer of an adapter's
            partition (of the whole stage, if it is any other module) and recomputes the rest;
            ``"offload"`` moves activations to host memory, which has no effect if the stages are
            already there. Losses and gradients stay the same. Offloading has not been run on a GPU
            yet.
        lookahead: how many computations ahead of its use a receive is posted. A larger number hides
            more latency and needs more receive buffers. Default: 2 through host memory, 0 from GPU
            to GPU. In the latter case the host is ahead of the device anyway, and a posted receive
            keeps the device busy: anything in a stage that waits for the whole device
            (``torch.cuda.synchronize()``, freeing memory, the first use of a kernel) would wait for
            messages that depend on this rank.
        timeout: how many seconds a rank waits for one message before the step fails on all ranks;
            also how long it waits for other ranks at construction and in calls like
            ``clip_grad_norm_``.
        bucket_bytes: mirrored gradients are exchanged in buckets of about this size.
        mirror_init: what makes the two copies of a stage equal at construction: ``"broadcast"``
            (the copy on the rank with the stage's number is used; a parameter that both stages of a
            rank hold belongs to the lower one), ``"check"`` (``ValueError`` if copies differ) or
            ``"none"``.
        split_weight_gradients: defer the weight gradients of ``nn.Linear`` (and of the ``Conv1D`` of
            transformers) to W. If off, everything is computed in I: correct, but with a larger
            bubble.
        transport: what messages between stages travel over. ``"host"``: host memory and the process
            group's backend for it, whatever device the stages are on. ``"nccl"``: from GPU to GPU,
            for stages on CUDA. ``"copy"``: likewise, by the copy engines of GPUs on one node, which
            takes no multiprocessors from computation. ``"auto"``: ``"nccl"`` if all ranks are
            processes with stages on a GPU of their own, otherwise ``"host"``;
            :attr:`Pipeline.transport` says which. None of the three has been run on a GPU yet.
        nccl_max_ctas: the most thread blocks that a message over NCCL may take from computation; 0:
            NCCL decides.
        dynamic_shapes: from GPU to GPU, describe each message to its receiver. Needed if a stage's
            outputs change in shape or dtype from step to step although its inputs do not.
        use_overlapped: run a stage's own ``overlapped_forward_backward`` if it has one.
        seed: reseeds torch before every stage's forward from (seed, step, stage, micro-batch), so
            that dropout depends neither on which ranks run the stages nor on the schedule
            (:func:`dualpipe_ext.microbatch_seed`); the caller's generators are left as they were.
            ``None``: random numbers come from the caller's generators
            (:class:`~dualpipe_ext.TrainingWrapper` chooses a seed). Only for ranks that are
            processes: threads share torch's single generator and would disturb one another.
    """

    num_stages: int = 0
    num_microbatches: int = 0
    schedule: str = "dualpipe"
    balance: Balance = "parameters"
    overlap_strategy: OverlapStrategy = "full"
    memory_optimization: MemoryOptimization = "none"
    lookahead: int | None = None
    timeout: float = 600.0
    bucket_bytes: int = 4 * 1024 * 1024
    mirror_init: MirrorInit = "broadcast"
    split_weight_gradients: bool = True
    use_overlapped: bool = True
    transport: Transport = "auto"
    nccl_max_ctas: int = 1
    dynamic_shapes: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        _at_least("num_stages", self.num_stages, 0)
        _at_least("num_microbatches", self.num_microbatches, 0)
        if self.lookahead is not None:
            _at_least("lookahead", self.lookahead, 0)
        _at_least("bucket_bytes", self.bucket_bytes, 1, num_bits=62)
        _at_least("nccl_max_ctas", self.nccl_max_ctas, 0)
        object.__setattr__(self, "balance", _checked_balance(self.balance))
        if self.num_stages and len(self.balance) != self.num_stages and not self.evens_out:
            raise ValueError(
                f"balance={list(self.balance)} has {len(self.balance)} sizes for {self.num_stages} "
                f"stages; give one each"
            )
        _one_of("overlap_strategy", self.overlap_strategy, OverlapStrategy)
        _one_of("memory_optimization", self.memory_optimization, MemoryOptimization)
        _one_of("transport", self.transport, Transport)
        _one_of("mirror_init", self.mirror_init, MirrorInit)
        if not isinstance(self.schedule, str):
            raise TypeError(
                f"schedule={self.schedule!r}: it must be a name of dualpipe_ext.schedule."
                f"schedules(); a schedule of your own is an argument of Pipeline"
            )
        for name in ("split_weight_gradients", "use_overlapped", "dynamic_shapes"):
            _of_type(name, getattr(self, name), bool)
        if self.seed is not None:
            _of_type("seed", self.seed, int)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)):
            raise TypeError(f"timeout={self.timeout!r}: it must be a number of seconds")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: it is in seconds and must be above 0")

    @property
    def evens_out(self) -> bool:
        """Whether ``balance`` names what to even out, rather than how many layers a stage gets."""
        return isinstance(self.balance, str)

    def resolved(self) -> DualPipeConfig:
        """Returns this configuration with what ``overlap_strategy`` decides filled in."""
        if self.overlap_strategy == "full":
            return self
        return replace(self, lookahead=0, split_weight_gradients=False, use_overlapped=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings, by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DualPipeConfig:
        """Creates a configuration from settings by name; omitted ones have their defaults.

        Raises:
            ValueError: an unknown setting, or a value that is not allowed.
            TypeError: a value of the wrong type, or ``settings`` is not a mapping.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings must be a mapping; found {type(settings).__name__}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(
                    f"{name!r} is no setting of {cls.__name__}; {_nearest(name, known)}"
                )
        return cls(**settings)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns all settings as YAML; also writes them to ``path``, if given."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> DualPipeConfig:
        """Reads a configuration from a YAML file, as :meth:`from_dict` does from a mapping.

        Raises:
            ValueError: as :meth:`from_dict`, with the file's path; or the file is not valid YAML.
            TypeError: as :meth:`from_dict`, with the file's path.
        """
        try:
            settings = yaml.safe_load(Path(path).read_text())
            return cls.from_dict({} if settings is None else settings)
        except yaml.YAMLError as error:
            raise ValueError(f"{os.fspath(path)} is no YAML: {error}") from error
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{os.fspath(path)}: {error}") from error


def _of_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(
            f"{name}={value!r}: it must be {'a' if wanted is bool else 'an'} {wanted.__name__}, not "
            f"{type(value).__name__}"
        )


def _at_least(name: str, value: int, least: int, num_bits: int = 31) -> None:
    _of_type(name, value, int)
    if value < least:
        raise ValueError(f"{name}={value}: it must be at least {least}")
    if value >= 1 << num_bits:
        raise ValueError(f"{name}={value}: it must be less than 2**{num_bits}")


def _one_of(name: str, value: object, kind: Any) -> None:
    allowed = [repr(each) for each in get_args(kind)]
    if repr(value) not in allowed:
        raise ValueError(f"{name}={value!r}: choose {', '.join(allowed[:-1])} or {allowed[-1]}")


def _checked_balance(balance: object) -> Balance:
    """Checks a balance; returns layer counts as a tuple, so that equal configurations are equal."""
    if isinstance(balance, (list, tuple)):
        for size in balance:
            _at_least("balance", size, 0)
        return tuple(balance)
    _one_of("balance", balance, BalanceCriterion)
    return balance  # type: ignore[return-value]


def _nearest(name: object, known: list[str]) -> str:
    if name in _OTHER_NAMES:
        return f"it is {_OTHER_NAMES[str(name)]!r} here"
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
