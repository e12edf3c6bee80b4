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
    """How the engine runs a pipeline. The same on every rank.

    Attributes:
        num_stages: of the whole model; a pipeline of another number is an error. 0: whatever the
            schedule has on the ranks that there are.
        num_microbatches: used by ``step`` where ``num_chunks`` is left out; 0: it must be given
            (:class:`~dualpipe_ext.TrainingWrapper` takes the least that the schedule serves).
        schedule: used where a pipeline is given none.
        balance: how an adapter cuts a whole model: ``"parameters"``, ``"memory"`` or ``"time"``
            evened out over the ranks, or the number of layers of each stage
            (:meth:`dualpipe_ext.adapters.ModelAdapterBase.partition`).
        overlap_strategy: ``"full"``, or ``"none"``, to compare with or to look for a mistake:
            receives are posted where they are used, weight gradients are computed with those of the
            inputs, a pair runs one after the other and mirrored gradients are summed after the
            step, whatever ``lookahead``, ``split_weight_gradients`` and ``use_overlapped`` say.
        memory_optimization: what to do about activations that wait for their backward:
            ``"activation_checkpoint"`` keeps the inputs of each layer of an adapter's partition (of
            each stage that is another module) and computes the rest again; ``"offload"`` moves them
            to host memory, which does nothing for stages that are there. Losses and gradients are
            the same numbers. Offloading has not run on a GPU yet.
        lookahead: computations ahead of its use at which a receive is posted. More hides more
            latency and holds more receive buffers. Left out: 2 through the host's memory, and 0 from
            GPU to GPU. There the host is ahead of the device anyway, and a posted receive keeps the
            device busy: whatever waits for all of it in a stage (``torch.cuda.synchronize()``,
            memory given back, a kernel's first use) would wait for messages that depend on this
            rank.
        timeout: seconds that a rank waits for one message, before the step fails on all ranks; or
            for the others at construction and in calls like ``clip_grad_norm_``.
        bucket_bytes: mirrored gradients are exchanged in pieces of about this size.
        mirror_init: what makes the two copies of a stage equal at construction: ``"broadcast"``
            (the rank with the stage's own number wins; what both stages of a rank hold is the
            lower one's), ``"check"`` (differing copies are a
            ``ValueError``) or ``"none"``.
        split_weight_gradients: defer the weight gradients of ``nn.Linear`` to the W of the
            schedule. Off: everything is computed in I, correctly and with a larger bubble.
        transport: what messages between stages travel over: ``"host"``, the memory of the host
            and the process group's backend for it, whatever device the stages are on;
            ``"nccl"``, from GPU to GPU, for stages on CUDA; or ``"copy"``, the same by the copy
            engines of GPUs on one node, which takes no processor from computation. ``"auto"``:
            ``"nccl"`` where all ranks are processes with stages on a GPU of their own, otherwise
            ``"host"``; :attr:`Pipeline.transport` says which. None of the three has run on a GPU yet.
        nccl_max_ctas: thread blocks that a message over NCCL may take from computation; 0: as many
            as NCCL likes.
        dynamic_shapes: from GPU to GPU, describe each message to its receiver. Needed where what a
            stage returns changes its shape or type from step to step with equal inputs.
        use_overlapped: run a stage's own ``overlapped_forward_backward`` where it has one.
        seed: reseeds torch before every stage's forward from (seed, step, stage, micro-batch), so
            that dropout does not depend on the ranks that run the stages, or on the schedule
            (:func:`dualpipe_ext.microbatch_seed`); the caller's generators stay as they were.
            ``None``: random numbers are the caller's
            (:class:`~dualpipe_ext.TrainingWrapper` chooses a seed).
            For ranks that are processes: threads share torch's one generator and disturb it.
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
        _at_least("bucket_bytes", self.bucket_bytes, 1)
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
        """Whether ``balance`` says what to even out, rather than how many layers a stage gets."""
        return isinstance(self.balance, str)

    def resolved(self) -> DualPipeConfig:
        """This configuration with what its ``overlap_strategy`` decides filled in."""
        if self.overlap_strategy == "full":
            return self
        return replace(self, lookahead=0, split_weight_gradients=False, use_overlapped=False)

    def to_dict(self) -> dict[str, Any]:
        """All settings, by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DualPipeConfig:
        """The configuration with these settings; what is left out has its default.

        Raises:
            ValueError: an unknown setting, or a value that is not allowed.
            TypeError: a value of a wrong type, or no mapping.
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
        """All settings as YAML; also written to ``path`` where one is given."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> DualPipeConfig:
        """The configuration in a YAML file, as :meth:`from_dict` reads it.

        Raises:
            ValueError: as there, with the file's name; or a file that is no YAML.
            TypeError: as there.
        """
        try:
            settings = yaml.safe_load(Path(path).read_text())
            return cls.from_dict({} if settings is None else settings)
        except yaml.YAMLError as error:
            raise ValueError(f"{os.fspath(path)} is no YAML: {error}") from error
        except (ValueError, TypeError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error


def _of_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(
            f"{name}={value!r}: it must be {'a' if wanted is bool else 'an'} {wanted.__name__}, not "
            f"{type(value).__name__}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    _of_type(name, value, int)
    if value < least:
        raise ValueError(f"{name}={value}: it must be at least {least}")


def _one_of(name: str, value: object, kind: Any) -> None:
    allowed = [repr(each) for each in get_args(kind)]
    if repr(value) not in allowed:
        raise ValueError(f"{name}={value!r}: choose {', '.join(allowed[:-1])} or {allowed[-1]}")


def _checked_balance(balance: object) -> Balance:
    """Numbers of layers as a tuple, so that equal configurations are equal."""
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
