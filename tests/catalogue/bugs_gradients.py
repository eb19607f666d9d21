"""Gradients that are not summed, or cut; sums that are taken of the wrong things."""

from __future__ import annotations

from tests.catalogue.bug import Bug, edit, part

STYLES = "styles"
TP_2 = "dp 2 tp 2"

GRADIENTS = [
    Bug(
        "B01a",
        "the router's weight is used as it is held, so its gradient stays a part on tp",
        edit(
            "layer.router",
            """redistribute(
            self.weight_ED, self.tp, src=I, dst=R, grad_dtype=sum_dtype(self.weight_ED)
        )""",
            "self.weight_ED",
        ),
        rule="types",
        at="router_logits(x_TD, weight_ED",
    ),
    Bug(
        "B01b",
        "scores are sliced by a plain rank: the slice is still I, so its gradient is never summed",
        part(
            "redistribute(scores, self.tp, src=I, dst=S(1))",
            "scores.chunk(self.tp.size, 1)[self.tp.rank]",
        ),
        target="experts_on_tp",
        layout=TP_2,
        rule="X2",
        at="torch.einsum",
    ),
    Bug(
        "B03a",
        "x is made R for the experts' backward only where there is ep",
        part(
            "x = redistribute(x, self.tp, src=I, dst=R)",
            "x = redistribute(x, self.tp, src=I, dst=R) if self.tp.size == 1 else x",
            STYLES,
        ),
        target="sharded_tp",
        layout=TP_2,
        rule="types",
        at="F.silu(F.linear(x, up))",
    ),
    Bug(
        "B32a",
        "the router's weights are gathered under no_grad, as their ids may be",
        edit(
            "layer.dispatch.all_gather",
            "        weights_R = take_scores(self._gather(weights_tK, shapes), here)\n",
            "        with torch.no_grad():\n"
            "            weights_TK = self._gather(weights_tK, shapes)\n"
            "        weights_R = take_scores(weights_TK, here)\n",
        ),
        target="gathering",
        rule="X3",
        at="gathered = redistribute(",
    ),
    Bug(
        "B32b",
        "the router's weights are detached before they are gathered",
        edit(
            "layer.dispatch.all_gather",
            "take_scores(self._gather(weights_tK, shapes), here)",
            "take_scores(self._gather(weights_tK.detach(), shapes), here)",
        ),
        target="gathering",
        rule="X3",
        at="weights_tK.detach()",
    ),
    Bug(
        "B32c",
        "the router's weights are gathered by a collective that has no backward",
        part(
            "redistribute(scores, self.tp, src=I, dst=S(1))",
            "redistribute(raw(scores, self.tp), self.tp, src=I, dst=S(1))",
        )
        + part(
            "class Batched(",
            "def raw(x, tp):\n    x = x.detach().clone()\n    dist.all_reduce(x, group=tp.group)\n"
            "    return x / tp.size\n\n\nclass Batched(",
        ),
        target="experts_on_tp",
        layout=TP_2,
        rule="X3",
        at="x.detach()",
    ),
    Bug(
        "B34a",
        "padding is kept out of the product and not out of its gradient",
        part("rows = torch.where(valid.unsqueeze(-1), x, 0.0)", "rows = x"),
        target="padded",
        layout=TP_2,
        values=True,
    ),
    Bug(
        "B40a",
        "the adapter is reduced and the expert beside it is not",
        part(
            "return base + torch.matmul(small, self.wide.T)",
            "return base + redistribute(\n"
            "            torch.matmul(small, self.wide.T), self.etp, src=P, dst=R\n        )",
        ),
        target="lora",
        layout="tp 2 etp 2",
        rule="types",
        at="return base + redistribute(",
    ),
]

SUMS = [
    Bug(
        "B04a",
        "each rank of ep has rows of other tokens, and the sum over ep still adds them up",
        part("everyone = redistribute(x, self.ep, src=S(0), dst=R)", "everyone = x", STYLES)
        + part(
            "        y = declare_sum(y, self.ep)\n"
            "        return redistribute(y, self.ep, src=P, dst=S(0)), self.load(x)",
            "        y = all_reduce(y, self.ep.group, src=P, dst=R)\n"
            "        return redistribute(y, self.ep, src=R, dst=S(0)), self.load(x)",
            STYLES,
        )
        + part("import torch\n", "import torch\nfrom spmd_types import all_reduce\n", STYLES),
        target="gather_ep",
        layout="dp 2 ep 2",
        tokens=(2, 8),
        run=4,
        rule="X1",
        at="all_reduce(y",
    ),
    Bug(
        "B04b",
        "the same, and the sum is declared to be one",
        part("everyone = redistribute(x, self.ep, src=S(0), dst=R)", "everyone = x", STYLES)
        + part(
            "        return redistribute(y, self.ep, src=P, dst=S(0)), self.load(x)",
            "        y = redistribute(y, self.ep, src=P, dst=R)\n"
            "        return redistribute(y, self.ep, src=R, dst=V), self.load(x)".replace(
                "dst=V", "dst=S(0)"
            ),
            STYLES,
        ),
        target="gather_ep",
        layout="dp 2 ep 2",
        tokens=(2, 8),
        run=4,
        values=True,
    ),
    Bug(
        "B07a",
        "every rank adds the experts' bias, and then their outputs are summed",
        edit(
            "layer.experts",
            "redistribute(self.b2_eD, self.etp, src=I, dst=P)",
            "self.b2_eD",
        ),
        target="biased",
        layout="tp 2 etp 2",
        rule="types",
        at="one_Re @ b2_eD",
    ),
    Bug(
        "B07b",
        "the same where the matmul's result is not declared a part of a sum",
        edit(
            "layer.experts",
            "redistribute(self.b2_eD, self.etp, src=I, dst=P)",
            "self.b2_eD",
        )
        + edit(
            "layer.experts",
            "        y_RD = declare_sum(part_RD, self.etp)  ",
            "        y_RD = part_RD  ",
        ),
        target="biased",
        layout="tp 2 etp 2",
        rule="types",
        at="@ b2_eD",
    ),
    Bug(
        "B08a",
        "a whole shared expert is added before the sum, which counts it once for each rank",
        part(
            "redistribute(self.routed(x, one_hot), self.tp, src=P, dst=I)",
            "self.routed(x, one_hot) + F.linear(x, self.beside)",
            STYLES,
        )
        + part(
            "y = y + F.linear(x, self.beside)",
            "y = redistribute(y, self.tp, src=P, dst=I)",
            STYLES,
        ),
        target="sharded_tp",
        layout=TP_2,
        rule="types",
        at="self.routed(x, one_hot) + F.linear",
    ),
    Bug(
        "B08b",
        "the same where the routed part is not declared a part of a sum",
        part("return declare_sum(y, self.tp)", "return y", STYLES)
        + part(
            "redistribute(self.routed(x, one_hot), self.tp, src=P, dst=I)",
            "all_reduce(\n            self.routed(x, one_hot)"
            " + F.linear(redistribute(x, self.tp, src=I, dst=R), redistribute(self.beside,"
            " self.tp, src=I, dst=R)),\n            self.tp.group, src=P, dst=I)",
            STYLES,
        )
        + part("        y = y + F.linear(x, self.beside)\n", "", STYLES)
        + part("import torch\n", "import torch\nfrom spmd_types import all_reduce\n", STYLES),
        target="sharded_tp",
        layout=TP_2,
        rule="X1",
        at="all_reduce(",
    ),
    Bug(
        "B10a",
        "the shared expert's parts are never summed",
        edit(
            "layer.shared_experts",
            "redistribute(\n"
            "            part_TD, self.tp, src=P, dst=S(0), shape=shape, dtype=sum_dtype(part_TD)\n"
            "        )",
            "part_TD.narrow(0, shape.offsets[self.tp.rank] if shape else 0, x_TD.shape[0])",
        ),
        target="shared",
        layout=TP_2,
        rule="types",
        at="return _gate(y_TD, x_TD",
    ),
    Bug(
        "B14a",
        "a collective in place makes the counts of all ranks out of this rank's own",
        part(
            "            local = counts.sum()\n            for role in DENSE:\n"
            "                axis = self.mesh[role]\n"
            "                counts = redistribute(declare_sum(counts, axis), axis, "
            "src=P, dst=R)\n",
            "            for role in DENSE:\n"
            "                dist.all_reduce(counts, group=self.mesh[role].group)\n"
            "            local = counts.sum()\n",
        ),
        target="bias_update",
        layout=TP_2,
        rule="types",
        at="dist.all_reduce(counts",
    ),
    Bug(
        "B20a",
        "the norm of the gradients leaves out the experts of other ranks",
        part(
            "squares = redistribute(declare_sum(squares, self.ep), self.ep, src=P, dst=R)",
            "pass",
        ),
        target="clip_norm",
        layout="dp 4 ep 2",
        rule="types",
        at="def forward(self, dense",
    ),
    Bug(
        "B20b",
        "the norm counts the experts once for each rank that has a copy",
        part(
            "squares = redistribute(declare_sum(squares, self.ep), self.ep, src=P, dst=R)",
            "for axis in (self.ep, self.edp):\n            squares = redistribute("
            "declare_sum(squares, axis), axis, src=P, dst=R)",
        ),
        target="clip_norm",
        layout="dp 4 ep 2",
        rule="types",
        at="declare_sum(squares, axis)",
    ),
    Bug(
        "B20c",
        "the norm takes the mean over the ranks that have other experts",
        part("(squares + dense.square().sum())", "(squares / self.ep.size + dense.square().sum())"),
        target="clip_norm",
        layout="dp 4 ep 2",
        values=True,
    ),
]
