"""How rows get to their experts and back. One protocol, one file for each way."""

from spmd_moe.layer.dispatch.all_gather import AllGather as AllGather
from spmd_moe.layer.dispatch.all_to_all import AllToAll as AllToAll
from spmd_moe.layer.dispatch.dedup_all_to_all import DedupAllToAll as DedupAllToAll
from spmd_moe.layer.dispatch.fixed_capacity import FixedCapacity as FixedCapacity
from spmd_moe.layer.dispatch.forecast import Batch as Batch
from spmd_moe.layer.dispatch.forecast import Collective as Collective
from spmd_moe.layer.dispatch.local import Local as Local
from spmd_moe.layer.dispatch.protocol import Arrived as Arrived
from spmd_moe.layer.dispatch.protocol import Dispatcher as Dispatcher
