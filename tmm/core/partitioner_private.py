"""The private names of torch by which it parts forward and backward passes; seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._functorch import config
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx import GraphModule


@dataclass(frozen=True)
class ChangedPartitioner(CustomPartitionerFn):
    """A partitioner of which ``before`` and ``after`` change what it sees.

    ``before`` is given the joint graph of a forward and a backward pass, and how many of its
    outputs are those of the forward pass; ``after`` the graph of the forward pass, and what
    ``before`` gave. ``version`` tells what both do: it is a part of the key of Inductor's caches.
    ``users`` is a partitioner of the user's, in the place of Inductor's.

    Inductor pickles it: functions have to be those of a module.
    """

    before: Callable[[GraphModule, int], Any]
    after: Callable[[GraphModule, Any], None]
    version: str
    users: CustomPartitionerFn | None = None

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        """The graphs of both passes."""
        if self.users is None and config.cse:
            # As the partitioner does first: what is hidden is to be computed once, too.
            gm.graph.eliminate_dead_code()
            gm.graph = fx_graph_cse(gm.graph)
        told = self.before(gm, options["num_fwd_outputs"])
        partition = self.users or min_cut_rematerialization_partition
        forward, backward = partition(gm, joint_inputs, **options)
        self.after(forward, told)
        return forward, backward

    def uuid(self) -> object:
        """A key for Inductor's caches; None where the user's partitioner has none."""
        own = "" if self.users is None else self.users.uuid()
        return None if own is None else (self.version, own)
