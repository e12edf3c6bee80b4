"""Whether the copies of a stage hold the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dualpipe_ext._handshake import collect
from dualpipe_ext.groups import PipelineGroup

__all__ = ["check_copies", "digest"]

_WORD = 8  # bytes
_PIECE = 1 << 17  # words at a time, which a cache holds
# Odd, and without a pattern in its bits: its odd multiples tell places apart.
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_PRIME = 31
_MASK = (1 << 64) - 1


def digest(tensors: Iterable[Tensor]) -> str:
    """64 bits of the values of all tensors, the same on every device; waits for them.

    It finds what went wrong by chance. It is no cryptographic hash, which a GPU has none of.
    """
    found = [_digest_of(tensor.detach()) for tensor in tensors if tensor.layout == torch.strided]
    total = 0
    for value in torch.stack(found).tolist() if found else []:
        total = (total * _PRIME + value) & _MASK
    return f"{total:016x}"


def check_copies(group: PipelineGroup, timeout: float, modules: Mapping[int, nn.Module]) -> None:
    """Raises on all ranks where parameters of a stage differ between its copies.

    Args:
        group: the ranks, which call it together.
        timeout: seconds to wait for the slowest one.
        modules: this rank's, by stage.

    Raises:
        ValueError: they differ, with the first one that does.
        PipelineError: a rank did not come.
    """

    def of_stages() -> dict[str, str]:
        return {str(stage): digest(module.parameters()) for stage, module in modules.items()}

    def of_parameters() -> dict[str, dict[str, str]]:
        return {
            str(stage): {name: digest([value]) for name, value in module.named_parameters()}
            for stage, module in modules.items()
            if str(stage) in different
        }

    failure = "could not read its parameters"
    different = _different(collect(group, timeout, of_stages, failure))
    if different:
        raise ValueError(_describe(collect(group, timeout, of_parameters, failure)))


def _different(by_rank: list[dict[str, str]]) -> set[str]:
    """The stages that ranks have different digests of."""
    first: dict[str, str] = {}
    for own in by_rank:
        first = own | first
    return {stage for own in by_rank for stage in own if own[stage] != first[stage]}


def _describe(by_rank: list[dict[str, dict[str, str]]]) -> str:
    holders: dict[str, list[int]] = {}
    for rank, own in enumerate(by_rank):
        for stage in own:
            holders.setdefault(stage, []).append(rank)
    stage, (one, other) = min(holders.items(), key=lambda item: int(item[0]))
    kept, lost = by_rank[one][stage], by_rank[other][stage]
    names = [name for name in kept if kept[name] != lost[name]]
    return (
        f"the two copies of stage {stage}, on ranks {one} and {other}, have different values in "
        f"{len(names)} of {len(kept)} parameters, the first of them {names[0]}; load weights on both "
        f"ranks and give both the same optimizer, or call sync_parameters(), which keeps those of "
        f"rank {stage}"
    )


def _digest_of(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    octets = values.contiguous().flatten().view(torch.uint8)
    total = torch.tensor(octets.numel(), device=octets.device)
    weights = (2 * torch.arange(_PIECE, device=octets.device) + 1) * _FACTOR
    for piece in _words(octets).split(_PIECE):
        mixed = piece ^ (piece >> 29)  # a product has nothing of its factors' bits below them
        total = total * _PRIME + (mixed * weights[: len(piece)]).sum()
    return total


def _words(octets: Tensor) -> Tensor:
    """The same bits as integers, with zeros behind them where they are no multiple of a word."""
    missing = -octets.numel() % _WORD
    aligned = octets.storage_offset() % _WORD == 0
    if missing or not aligned:
        octets = torch.nn.functional.pad(octets, (0, missing))
    return octets.view(torch.int64)
