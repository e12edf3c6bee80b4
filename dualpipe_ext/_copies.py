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
_PIECE = 1 << 17  # words at a time, which fit into a cache
# Odd, and without a pattern in its bits.
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_PRIME = 31
_MASK = (1 << 64) - 1


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns 64 bits that depend on the values of all tensors, as hexadecimal digits.

    They are the same on every device; the call waits for the tensors. Of a sharded tensor, only
    this rank's part counts. The digest detects accidental differences: it is not a cryptographic
    hash, as there is none for GPUs.

    Raises:
        TypeError: a sparse tensor that is not in the COO layout.
    """
    total = 0
    for tensor in tensors:
        for part in _parts(local_part(tensor.detach())):
            total = (total * _PRIME + int(_digest_of(part))) & _MASK
    return f"{total:016x}"


def check_copies(group: PipelineGroup, timeout: float, modules: Mapping[int, nn.Module]) -> None:
    """Raises on all ranks if parameters of a stage differ between its copies.

    Args:
        group: the ranks, which call this together.
        timeout: seconds to wait for the slowest rank.
        modules: the modules of this rank, by stage.

    Raises:
        ValueError: the copies differ; names the first parameter that does.
        PipelineError: a rank did not join.
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
    """Returns one digest per stage, which does not depend on the order of its parameters."""
    return {
        stage: sha256(repr(sorted(named.items())).encode()).hexdigest()
        for stage, named in _by_name(modules).items()
    }


def _different(by_rank: list[dict[str, str]]) -> set[str]:
    """Returns the stages of which ranks have different digests."""
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
    """Returns the dense tensors that a tensor consists of; none for one on the meta device."""
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
    """Returns odd numbers, one per position; sums of small multiples of them are rarely equal."""
    multiples = torch.arange(1, count + 1, device=device) * _FACTOR
    return (_mixed(multiples) * _FACTOR) | 1


def _mixed(words: Tensor) -> Tensor:
    """Mixes high bits into low ones: a bit of a product depends on no higher bit of its factors."""
    return words ^ (words >> 29)


def _words(octets: Tensor) -> Tensor:
    """Returns the same bits as integers, padded with zeros to a multiple of a word."""
    missing = -octets.numel() % _WORD
    if missing or octets.storage_offset() % _WORD:
        octets = torch.nn.functional.pad(octets, (0, missing))
        octets = octets if missing else octets.clone()
    return octets.view(torch.int64)
