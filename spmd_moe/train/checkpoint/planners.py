"""The planners of torch.distributed.checkpoint, told where the parts of this package's tensors are.

torch calls `create_local_plan` on every rank and `create_global_plan` on the coordinator, and turns
an error on one rank into an error on all. So what can fail on some ranks only is raised here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spmd_moe.core.errors import CheckpointError, SpmdMoeError, explain
from spmd_moe.train.checkpoint.random_state import PREFIX as RANDOM
from spmd_moe.train.checkpoint.rank_parts import Parts
from spmd_moe.train.checkpoint.strict_json import Json


@final
class SaveParts(DefaultSavePlanner):
    """`stage` is this rank's stage of a pipeline; `groups` what the index says of its optimizer,
    passed by one rank of each stage."""

    def __init__(self, stage: int, groups: Json, wrong: SpmdMoeError | None) -> None:
        super().__init__(flatten_state_dict=False)
        self.stage, self.groups, self.wrong = stage, groups, wrong

    def create_local_plan(self) -> SavePlan:
        wrong = self.wrong
        if wrong is not None:
            raise wrong
        self.plan = replace(super().create_local_plan(), planner_data=(self.stage, self.groups))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Collect the optimizer groups of all stages; refuse a name that two stages have."""
        stage_of: dict[str, int] = {}
        by_stage: dict[int, list[Json]] = {}
        for plan in all_plans:
            stage, groups = plan.planner_data
            if groups is not None:
                by_stage[stage] = groups
            for item in plan.items:
                name = item.index.fqn
                if stage_of.setdefault(name, stage) != stage and not name.startswith(RANDOM):
                    raise _same_name(name, stage_of[name], stage)
        self.groups = [g for stage in sorted(by_stage) for g in by_stage[stage]] or None
        return super().create_global_plan([replace(p, planner_data=None) for p in all_plans])

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


def _same_name(name: str, first: int, second: int) -> CheckpointError:
    return CheckpointError(
        explain(
            "save_checkpoint",
            f"stages {first} and {second} of the pipeline both have a tensor {name!r}",
            why="in one checkpoint they would be taken for one tensor",
            fixes=['prefix=f"stage{number}."   # number: this rank\'s stage'],
        )
    )


@final
class LoadParts(DefaultLoadPlanner):
    """`names` are the tensors of the checkpoint that some rank must want; `refuse` is called with
    those that none does."""

    def __init__(
        self,
        names: Collection[str],
        refuse: Callable[[list[str]], None],
        wrong: SpmdMoeError | None,
    ) -> None:
        super().__init__()
        self.names, self.refuse, self.wrong = names, refuse, wrong

    def set_up_planner(
        self, state_dict: Parts, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict: dict[str, Any] = dict(state_dict)
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        wrong = self.wrong
        if wrong is not None:
            raise wrong
        assert self.metadata is not None
        plan = []
        for name, part in self.state_dict.items():
            if part.chunks():
                stored = self.metadata.state_dict_metadata[name]
                assert isinstance(stored, TensorStorageMetadata)
                plan += create_read_items_for_chunk_list(name, stored, part.chunks())
        return LoadPlan(plan)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        self.refuse(sorted(set(self.names) - wanted))
        return global_plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


def run_plan(where: str, path: Path, plan: Callable[[], object]) -> None:
    """Let torch plan and do it. An error on some ranks is one error on all."""
    try:
        with warnings.catch_warnings():
            if not dist.is_initialized():  # torch warns of what is no mistake here
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            plan()
    except CheckpointException as failed:
        rank = min(failed.failures)
        error = failed.failures[rank][0]
        if isinstance(error, SpmdMoeError):
            raise error from None
        if not isinstance(error, OSError):
            raise failed
        raise CheckpointError(
            explain(
                where,
                f"{path.name!r}, on rank {rank}: {error.strerror or error}",
                why="the disk refused; checkpoints that were complete are as they were",
                fixes=["another folder, or room on this one"],
            )
        ) from error
