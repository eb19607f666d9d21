"""How rows get to their experts and back. One protocol, one file for each way."""

from spmd_moe.dispatch.all_gather import AllGather as AllGather
from spmd_moe.dispatch.all_to_all import AllToAll as AllToAll
from spmd_moe.dispatch.fixed import FixedCapacity as FixedCapacity
from spmd_moe.dispatch.local import Local as Local
from spmd_moe.dispatch.protocol import Arrived as Arrived
from spmd_moe.dispatch.protocol import Dispatcher as Dispatcher
