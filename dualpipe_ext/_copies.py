"""Whether the copies of a stage hold the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from dualpipe_ext._handshake import collect
from dualpipe_ext._sharded import local_part
from dualpipe_ext.groups import PipelineGroup

__all__ = ["check_copies", "digest"]

_WORD = 8  # bytes
_PIECE = 1 << 17  # words at a time, which a cache holds
# Odd, and without a pattern in its bits.
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_PRIME = 31
_MASK = (1 << 64) - 1


def digest(tensors: Iterable[Tensor]) -> str:
    """64 bits of the values of all tensors, the same on every device; waits for them.

    Of sharded ones, of this rank's parts.

    It finds what went wrong by chance. It is no cryptographic hash, which a GPU has none of.

    Raises:
        TypeError: a sparse tensor of another kind than COO.
    """
    total = 0
    for tensor in tensors:
        for part in _parts(local_part(tensor.detach())):
            total = (total * _PRIME + int(_digest_of(part))) & _MASK
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
    failure = "could not read its parameters"
    by_rank = collect(group, timeout, lambda: _by_stage(modules), failure)
    different = _different(by_rank)
    if different:
        found = {stage: module for stage, module in modules.items() if str(stage) in different}
        raise ValueError(_describe(collect(group, timeout, lambda: _by_name(found), failure)))


def _by_name(modules: Mapping[int, nn.Module]) -> dict[str, dict[str, str]]:
    return {
        str(stage): {name: digest([value]) for name, value in module.named_parameters()}
        for stage, module in modules.items()
    }


def _by_stage(modules: Mapping[int, nn.Module]) -> dict[str, str]:
    """One text a stage, whatever the order of its parameters."""
    return {
        stage: sha256(repr(sorted(named.items())).encode()).hexdigest()
        for stage, named in _by_name(modules).items()
    }


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
    first, second = by_rank[one][stage], by_rank[other][stage]
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return (
        f"the two copies of stage {stage}, on ranks {one} and {other}, differ in {len(names)} of "
        f"{len(first | second)} parameters, the first of them {names[0]}; load weights on both "
        f"ranks and give both the same optimizer, or call sync_parameters(), which keeps those of "
        f"rank {stage}"
    )


def _parts(tensor: Tensor) -> list[Tensor]:
    """Tensors that have memory: none of one that is on the meta device."""
    if tensor.is_meta:
        return []
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return [whole.indices(), whole.values()]
    raise TypeError(f"tensors of layout {tensor.layout} cannot be compared")


def _digest_of(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    octets = values.resolve_neg().contiguous().flatten().view(torch.uint8)
    total = torch.tensor(octets.numel(), device=octets.device)
    weights = _weights(min(_PIECE, octets.numel() // _WORD + 1), octets.device)
    for piece in octets.split(_PIECE * _WORD):
        words = _words(piece)
        total = total * _PRIME + (_mixed(words) * weights[: len(words)]).sum()
    return total


def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers, one for each place, of which no two sums of small multiples are likely equal."""
    multiples = torch.arange(1, count + 1, device=device) * _FACTOR
    return (_mixed(multiples) * _FACTOR) | 1


def _mixed(words: Tensor) -> Tensor:
    """With high bits in low places too: a product has nothing of a factor's bits below them."""
    return words ^ (words >> 29)


def _words(octets: Tensor) -> Tensor:
    """The same bits as integers, with zeros behind them where they are no multiple of a word."""
    missing = -octets.numel() % _WORD
    if missing or octets.storage_offset() % _WORD:
        octets = torch.nn.functional.pad(octets, (0, missing))
        octets = octets if missing else octets.clone()
    return octets.view(torch.int64)
