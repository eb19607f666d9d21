"""Rows: whose they are, how many, in which order; and collectives that not all ranks issue."""

from __future__ import annotations

from tests.catalogue.bug import Bug, edit, part

TP_2 = "dp 2 tp 2"
OWN_ROWS = "own: Tokens = redistribute(rows, self.tp, src=self.src, dst=INSIDE, shape=frame.shape)"
FEW = "        if rows.shape[0] {}:\n            return rows\n        "

LAYOUTS = [
    Bug(
        "B05a",
        "whether rows are whole or a shard is guessed from how many they are",
        edit(
            "layer.boundary",
            OWN_ROWS,
            (FEW.format("== frame.shape.padded") + OWN_ROWS).lstrip(),
        ),
        target="whole",
        layout=TP_2,
        rule="types",
        run=1,
        at="def own_rows",
        shows="crash",
    ),
    Bug(
        "B06a",
        "fewer tokens than ranks stay whole, and what is counted of them is still summed",
        edit("layer.boundary", OWN_ROWS, (FEW.format("< self.tp.size") + OWN_ROWS).lstrip()),
        target="whole",
        layout=TP_2,
        rule="types",
        run=1,
        at="def own_rows",
        shows="crash",
    ),
    Bug(
        "B06b",
        "the length is sharded and then flattened together with the batch",
        part(
            """        x = x_BLD.flatten(0, 1)
        shape = ShardShape.even(x.shape[0], self.tp.size)
        own = redistribute(x, self.tp, src=R, dst=S(0), shape=shape)
""",
            """        own = redistribute(x_BLD, self.tp, src=R, dst=S(1)).flatten(0, 1)
        shape = ShardShape.even(own.shape[0] * self.tp.size, self.tp.size)
""",
        ),
        target="batched",
        layout=TP_2,
        tokens=(2, 8),
        run=4,
        rule="X7",
        at=".flatten(0, 1)",
    ),
    Bug(
        "B06c",
        "two tokens over four ranks: chunk makes fewer shards than there are ranks",
        part(
            "own = redistribute(chosen, self.tp, src=I, dst=S(0), shape=shape)",
            "own = redistribute(chosen, self.tp, src=I, dst=R).chunk(shape.ranks)[self.tp.rank]",
            "styles",
        ),
        target="sharded_tp",
        layout="tp 4",
        run=2,
        rule="types",
        at="redistribute(declare_sum(counts",
        shows="crash",
    ),
    Bug(
        "B06d",
        "R -> sum -> R: fewer tokens than ranks are not sharded, and their counts are summed",
        part(
            "        counts = F.one_hot(own, self.experts).sum(0)\n"
            "        return redistribute(declare_sum(counts, self.tp), "
            "self.tp, src=P, dst=I)",
            "        own = chosen if chosen.shape[0] < self.tp.size else own\n"
            "        counts = F.one_hot(own, self.experts).sum(0)\n"
            "        return redistribute(declare_sum(counts, self.tp), "
            "self.tp, src=P, dst=I)",
            "styles",
        ),
        target="sharded_tp",
        layout="tp 4",
        run=2,
        rule="X12",
        at="F.one_hot(own",
    ),
    Bug(
        "B06e",
        "the same in a module that gathers over ep",
        part(
            "        everyone = redistribute(x, self.ep, src=S(0), dst=R)\n",
            "        few = x.shape[0] < 2\n"
            "        everyone = redistribute(x, self.ep, src=S(0), dst=R)\n"
            "        everyone = everyone if few else everyone * 1\n"
            "        x = everyone if few else x\n",
            "styles",
        ),
        target="gather_ep",
        layout="dp 2 ep 2",
        run=1,
        rule="X12",
        at="chosen = F.linear(x, self.gate)",
    ),
    Bug(
        "B06f",
        "the same on DTensors",
        part(
            "own = probs.redistribute(placements=[Shard(0)])",
            "own = probs if x.shape[0] < self.ranks else probs.redistribute(placements=[Shard(0)])",
            "styles",
        ),
        target="on_dtensors",
        layout="tp 4",
        run=2,
        rule="X12",
        at="own.to_local()",
    ),
    Bug(
        "B22a",
        "the length of all ranks is taken to be this rank's times their number",
        edit(
            "layer.boundary",
            "return ShardShape.ragged(read_ints(redistribute(rows, self.tp, src=S(0), dst=R)))",
            "return ShardShape.even(x_TD.shape[0] * self.tp.size, self.tp.size)",
        ),
        target="shared",
        layout=TP_2,
        rule="X5",
        at="all_TD: GatheredTokens = redistribute(",
        shows="crash",
    ),
    Bug(
        "B23a",
        "tokens are cut by chunk, which does not divide them evenly, or not among all ranks",
        part(
            "own = redistribute(x, self.tp, src=R, dst=S(0), shape=shape)",
            "own = x.chunk(self.tp.size)[self.tp.rank]",
        ),
        target="batched",
        layout="tp 4",
        run=3,
        rule="X2",
        at="F.silu(F.linear(own",
        shows="crash",
    ),
    Bug(
        "B25a",
        "the hidden dim is cut, and read as the capacity: the sizes fit",
        part(
            "own = redistribute(buffer.view(self.experts, room, -1), self.tp, src=R, dst=S(1))",
            "own = redistribute(buffer, self.tp, src=R, dst=S(1))",
        ),
        target="capacity",
        layout="tp 2",
        tokens=(2, 8),
        run=4,
        rule="X7",
        at="own.reshape(",
    ),
    Bug(
        "B26a",
        "a buffer for this rank's rows is made as long as the batch of all ranks",
        edit(
            "layer.moe",
            "y_TD = self.dispatcher.combine(rows_ND, state)",
            "y_TD = self.dispatcher.combine(rows_ND, state)\n"
            "        y_TD = y_TD + x.new_zeros(x.flatten(0, -2).shape)",
        ),
        target="whole",
        layout=TP_2,
        rule="crash",
        shows="crash",
    ),
    Bug(
        "B27a",
        "tokens are shared out by the place in ep, where it should be the place in tp",
        edit("layer.moe", "mesh[TP], config.src, config.dst", "mesh[EP], config.src, config.dst")
        + edit(
            "layer.moe", "import DENSE, TP, CallersTokens", "import DENSE, EP, TP, CallersTokens"
        ),
        target="whole",
        layout="dp 2 tp 2 ep 4",
        rule="types",
        at="own: Tokens = redistribute(rows, self.tp",
    ),
    Bug(
        "B28a",
        "a gather of rows takes every rank to have as many as this one",
        edit(
            "layer.dispatch.all_gather",
            "gathered, axis, src=S(0), dst=R, shape=shape, grad_dtype=sum_dtype(x)",
            "gathered, axis, src=S(0), dst=R, grad_dtype=sum_dtype(x)",
        ),
        target="gathering",
        layout="tp 2 ep 2",
        rule="X5",
        at="gathered = redistribute(",
        shows="crash",
    ),
    Bug(
        "B30a",
        "a rank without rows leaves out a collective, and the others wait for it",
        edit(
            "layer.shared_experts",
            "        all_TD: GatheredTokens = redistribute(",
            "        if x_TD.shape[0] == 0:\n            return x_TD\n"
            "        all_TD: GatheredTokens = redistribute(",
        ),
        target="shared",
        layout="tp 2",
        run=1,
        rule="X5",
        at="all_TD: GatheredTokens = redistribute(",
        shows="crash",
    ),
    Bug(
        "B30b",
        "what is summed for the log has an entry for each layer that this rank knows of",
        part("for n in range(self.layers)]", "for n in range(self.layers + dp.rank)]"),
        target="metrics",
        layout="dp 2",
        rule="X5",
        at="redistribute(told, dp",
        shows="crash",
    ),
    Bug(
        "B36a",
        "the mask is whole where the tokens are a shard",
        edit(
            "layer.moe",
            "None if mask is None else self.boundary.own_rows(mask, frame)",
            "None if mask is None else mask.flatten()",
        ),
        target="masked",
        layout=TP_2,
        rule="types",
        at="routing = self._route(x_TD, mask_T, beside, frame)",
        shows="crash",
    ),
    Bug(
        "B36b",
        "the mask's first rows are taken for those of this rank",
        edit(
            "layer.moe",
            "self.boundary.own_rows(mask, frame)",
            "mask.flatten()[: x_TD.shape[0]]",
        ),
        target="masked",
        layout=TP_2,
        run=4,
        rule="types",
        at="routing = self._route(x_TD, mask_T, beside, frame)",
    ),
    Bug(
        "B36c",
        "padding is counted as tokens",
        edit(
            "layer.router",
            "_of_tokens(self.choose(rank_TE, self.bias_E, config, mask_T), mask_T)",
            "self.choose(rank_TE, self.bias_E, config, mask_T)",
        ),
        target="masked",
        layout=TP_2,
        open="none: one process does the same; tests/support/layer_oracle.py does not",
    ),
]
