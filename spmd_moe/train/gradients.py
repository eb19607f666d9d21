"""Between backward and the optimizer's step: gradients reduced, their norm, and clipping.

loss.backward()
reduce_gradients(model, mesh)          # without FSDP, which reduces in backward
clip_grad_norm_(model, mesh, 1.0)
optimizer.step()
optimizer.zero_grad()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import TypeAlias, final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from spmd_moe.core.compute_dtype import sum_dtype
from spmd_moe.core.errors import ConfigError, GradientError, explain
from spmd_moe.core.mesh import Axis, MoEMesh, check_mesh
from spmd_moe.core.moves import wait_for
from spmd_moe.core.placement import P, R, Role, S
from spmd_moe.core.redistribute import redistribute
from spmd_moe.train.obligations import Obligation, trained
from spmd_moe.train.reduced_gradients import is_sum, note_sum, rest_of_sum
from spmd_moe.train.storage_mesh import shard_group

BUCKET_BYTES = 64 * 2**20  # of one reduction; it allocates twice as much

Trained: TypeAlias = tuple[Obligation, nn.Parameter]


@torch.no_grad()
def reduce_gradients(model: nn.Module, mesh: MoEMesh) -> None:
    """Sum every gradient over the axes on which its parameter is R.

    Call it once for each step, on every rank, after the backward of the last micro-batch. Sums
    are taken in float32 or wider. A gradient that is None on some ranks counts as zero there. Not
    needed after `parallelize`.

    Args:
        model: The model.
        mesh: The mesh.

    Raises:
        GradientError: It was called before without a `zero_grad` between, or the model is stored
            by `parallelize`.
        PlacementError: A parameter has no placement.

    Example:
        >>> import torch
        >>> from spmd_moe import reduce_gradients
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> layer(torch.ones(3, 8)).hidden.sum().backward()
        >>> reduce_gradients(layer, mesh)
    """
    check_mesh("reduce_gradients", mesh)
    pairs = trained(model, mesh)
    _check_plain(pairs)
    groups = [_Owing(parameters, axes) for axes, parameters in _by_axes(pairs, mesh)]
    _read_once(pairs, groups)
    for group in groups:
        for bucket in _buckets(group.flat_gradients()):
            _reduce(bucket, group.axes)
        for gradient, flat in group.copies:
            gradient.copy_(flat.view_as(gradient))
    for _, parameter in pairs:
        if parameter.grad is not None:
            note_sum(parameter)


def _check_plain(pairs: Sequence[Trained]) -> None:
    for row, parameter in pairs:
        if isinstance(parameter, DTensor):
            raise GradientError(
                explain(
                    "reduce_gradients",
                    f"{row.name!r} is sharded by parallelize",
                    why="FSDP has reduced its gradient in backward already",
                    fixes=["leave reduce_gradients out"],
                )
            )


def _owed(row: Obligation, mesh: MoEMesh) -> tuple[Role, ...]:
    return tuple(role for role in row.reduce_axes if mesh[role].size > 1)


def _by_axes(
    pairs: Sequence[Trained], mesh: MoEMesh
) -> Iterator[tuple[list[Axis], list[nn.Parameter]]]:
    """Parameters that can be reduced together: over the same axes, of one dtype and device."""
    groups: dict[tuple[tuple[Role, ...], object, object], list[nn.Parameter]] = {}
    for row, parameter in pairs:
        key = _owed(row, mesh), parameter.dtype, parameter.device
        if key[0]:
            groups.setdefault(key, []).append(parameter)
    for (roles, _, _), parameters in groups.items():
        yield [mesh[role] for role in roles], parameters


@final
class _Owing:
    """Parameters whose gradients are to be summed over the same axes, and the ranks that have
    a gradient for each: a parameter without one on all ranks stays without, as in one process."""

    def __init__(self, parameters: list[nn.Parameter], axes: list[Axis]) -> None:
        self.parameters, self.axes = parameters, axes
        ranks = parameters[0].new_ones(len(parameters), dtype=torch.int64)
        self.missing = [n for n, parameter in enumerate(parameters) if parameter.grad is None]
        for number in self.missing:
            ranks[number].zero_()
        self.ranks, self.nowhere = _summed(ranks, axes), frozenset[int]()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def flat_gradients(self) -> Iterator[Tensor]:
        """Those that some rank has, of zeros where this rank has none.

        They are views, except of gradients that are not contiguous: those are in `copies`, too.
        """
        for number, parameter in enumerate(self.parameters):
            if number in self.nowhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            flat = parameter.grad.reshape(-1)
            if not parameter.grad.is_contiguous():
                self.copies.append((parameter.grad, flat))
            yield flat


def _read_once(pairs: Sequence[Trained], groups: Sequence[_Owing]) -> None:
    """Raise if an earlier sum is in a gradient, and note which gradients no rank has.

    One device synchronization for both; none if every parameter has a gradient that zero_grad had
    set to None.
    """
    rests = [(row.name, rest) for row, p in pairs if (rest := rest_of_sum(p)) is not None]
    asking = [group for group in groups if group.missing]
    numbers = [rest.view(1) for _, rest in rests] + [group.ranks for group in asking]
    if not numbers:
        return
    device = numbers[0].device
    found = iter(torch.cat([n.to(device) for n in numbers]).tolist())
    summed = [name for name, _ in rests if next(found)]
    if summed:
        raise GradientError(
            explain(
                "reduce_gradients",
                f"the gradient of {summed[0]!r} has been reduced before",
                why="what was summed over the ranks then would be summed again",
                fixes=["optimizer.zero_grad()   # after each step, before the next backward"],
            )
        )
    for group in asking:
        ranks = [next(found) for _ in group.parameters]
        group.nowhere = frozenset(n for n, count in enumerate(ranks) if not count)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces of flat gradients that are reduced together. A large gradient is split.

    The split depends on sizes only, which are the same on every rank.
    """
    bucket, room = list[Tensor](), 0
    for gradient in gradients:
        most = max(BUCKET_BYTES // sum_dtype(gradient).itemsize, 1)
        room = room if bucket else most
        rest = gradient
        while rest.numel():
            piece, rest = rest[:room], rest[room:]
            bucket.append(piece)
            room -= piece.numel()
            if not room:
                yield bucket
                bucket, room = [], most
    if bucket:
        yield bucket


def _reduce(bucket: list[Tensor], axes: list[Axis]) -> None:
    """Reduce a bucket over each axis. The memory is that of the gradients, plus one buffer that is
    sent and one that is received."""
    sizes = [piece.numel() for piece in bucket]
    flat = bucket[0].new_empty(sum(sizes), dtype=sum_dtype(bucket[0]))
    torch._foreach_copy_(list(flat.split(sizes)), bucket)
    torch._foreach_copy_(bucket, list(_summed(flat, axes).split(sizes)))


def _summed(flat: Tensor, axes: list[Axis]) -> Tensor:
    for axis in axes:
        # spmd: allow move - gradients, whose kinds are data: parts of a sum on these axes
        flat = wait_for(redistribute(flat, axis, src=P, dst=R))
    return flat


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    mesh: MoEMesh,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    pipeline: ProcessGroup | None = None,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients so that their norm over the whole model is at most `max_norm`.

    Every rank must call it. Each value counts once, on all ranks that store it.

    Args:
        model: The model.
        mesh: The mesh.
        max_norm: The upper bound of the norm.
        norm_type: The type of the norm; `math.inf` is the maximum.
        error_if_nonfinite: Whether a norm that is NaN or infinite raises.
        pipeline: The process group of the pipeline stages, if the model is one of them.
        foreach: As in torch.

    Returns:
        The norm before scaling: that of one process with the whole model, equal on all ranks.

    Raises:
        ConfigError: `norm_type` is not positive.
        GradientError: Gradients are not reduced, or not finite with `error_if_nonfinite`.

    Example:
        >>> import torch
        >>> from spmd_moe import clip_grad_norm_, reduce_gradients
        >>> from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
        >>> mesh = MoEMesh.single()
        >>> layer = MoE(MoEConfig(8, 16, RouterConfig(4, top_k=2)), mesh)
        >>> init_weights(layer, mesh, seed=0)
        >>> layer(torch.ones(3, 8)).hidden.sum().backward()
        >>> reduce_gradients(layer, mesh)
        >>> norm = clip_grad_norm_(layer, mesh, max_norm=1.0)
    """
    check_mesh("clip_grad_norm_", mesh)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ConfigError(
            explain(
                "clip_grad_norm_",
                f"norm_type is {norm_type}",
                why="a norm is a root of a sum of powers, or a maximum",
                fixes=["norm_type=2.0", "norm_type=math.inf"],
            )
        )
    pairs = trained(model, mesh)
    total = _total_norm(pairs, mesh, norm_type, pipeline, model)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise GradientError(
            explain(
                "clip_grad_norm_",
                "the norm of the gradients is not finite",
                why="scaling by it would make every gradient unusable",
                fixes=["error_if_nonfinite=False   # torch's own way: scale all the same"],
            )
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, same in _alike([_local(p.grad) for _, p in pairs if p.grad is not None]):
        if foreach is False:
            for grad in same:
                grad.mul_(scale.to(grad.device))
        else:
            torch._foreach_mul_(same, scale.to(same[0].device))
    return total


def _total_norm(
    pairs: Sequence[Trained],
    mesh: MoEMesh,
    norm_type: float,
    pipeline: ProcessGroup | None,
    model: nn.Module,
) -> Tensor:
    """Each part is counted once: powers are added over the axes on which ranks have other parts.

    Over which, and in which dtype, follows from the parameters: which of them have a gradient can
    differ from rank to rank.
    """
    parts: dict[tuple[ProcessGroup, ...], list[nn.Parameter]] = {}
    for row, parameter in pairs:
        stored = isinstance(parameter, DTensor)  # by parallelize: FSDP reduces in backward
        owing = parameter.grad is not None and not stored and _owed(row, mesh)
        if owing and not is_sum(parameter):
            raise GradientError(
                explain(
                    "clip_grad_norm_",
                    f"the gradient of {row.name!r} is still to be summed over "
                    f"{', '.join(map(str, _owed(row, mesh)))}",
                    why="a sum that is not taken has no norm",
                    fixes=["reduce_gradients(model, mesh)   # before it, after the last backward"],
                )
            )
        shards = shard_group(parameter)
        over = [*([shards] if shards else []), *(mesh[role].group for role in row.norm_axes)]
        parts.setdefault(tuple(over), []).append(parameter)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums = [torch.zeros((), device=device)]
    for groups, parameters in parts.items():
        power = _power(parameters, norm_type, device)
        for group in groups:
            power = _over(power, group, norm_type)
        sums.append(power)
    power = _joined(sums, norm_type)
    if pipeline is not None:
        power = _over(power, pipeline, norm_type)
    return power if math.isinf(norm_type) else power ** (1.0 / norm_type)


def _power(parameters: list[nn.Parameter], norm_type: float, device: torch.device) -> Tensor:
    """The norm of some gradients to the power of its type, or their maximum; 0 where none are."""
    dtype = reduce(torch.promote_types, map(sum_dtype, parameters))
    powers = [torch.zeros((), dtype=dtype, device=device)]
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    for _, same in _alike([grad for grad in grads if grad.numel()]):  # an empty one has no maximum
        norms = torch.stack(torch._foreach_norm(same, norm_type, sum_dtype(same[0]))).to(device)
        powers.append(norms.amax() if math.isinf(norm_type) else (norms**norm_type).sum())
    return _joined(powers, norm_type).to(dtype)


def _joined(powers: list[Tensor], norm_type: float) -> Tensor:
    widest = max((power.dtype for power in powers), key=lambda dtype: dtype.itemsize)
    stacked = torch.stack([power.to(widest) for power in powers])
    return stacked.amax() if math.isinf(norm_type) else stacked.sum()


def _over(power: Tensor, group: ProcessGroup, norm_type: float) -> Tensor:
    """The powers of all ranks joined: gathered, so that one way serves sums and maxima."""
    every = redistribute(power.reshape(1), group, src=S(0), dst=R)
    return every.amax() if math.isinf(norm_type) else every.sum()


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _alike(tensors: list[Tensor]) -> Iterator[tuple[object, list[Tensor]]]:
    """Tensors of one device and dtype together: what one foreach kernel takes."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    yield from groups.items()
