"""Counters, scales, initial values: what kinds see of them, and what only numbers show."""

from __future__ import annotations

from tests.catalogue.bug import Bug, edit, part

TP_2 = "dp 2 tp 2"
IN_BACKWARD = "y_TD = count_in_backward(y_TD, chosen_E, self.router.seen_E)"

STATE = [
    Bug(
        "B13a",
        "the selection bias follows counts that are not summed over tp",
        edit(
            "layer.selection_bias",
            "summed_LE: Whole = sum_over(counted_LE, [mesh[role] for role in DENSE])",
            "summed_LE: Whole = sum_over(counted_LE, [mesh[role] for role in DENSE[:2]])",
        ),
        target="step",
        layout=TP_2,
        rule="types",
        at="seen_LE = summed_LE.to(",
    ),
    Bug(
        "B13b",
        "the same where counts have no kind of their own: the bias differs from rank to rank",
        part("for role in DENSE:\n", "for role in DENSE[:2]:\n"),
        target="bias_update",
        layout=TP_2,
        rule="X4",
        at="bias",
    ),
    Bug(
        "B15a",
        "loss terms are handed out as R, so their gradient is summed over tp once more",
        edit("layer.balance_losses", "x, mesh[TP], src=P, dst=I)", "x, mesh[TP], src=P, dst=R)"),
        target="whole",
        layout=TP_2,
        rule="types",
        at="def _whole(",
    ),
    Bug(
        "B15b",
        "a part of a sum is scaled by the number of this rank's tokens",
        edit(
            "layer.balance_losses",
            "z_sum=declare_sums(z_T.sum(), everywhere),",
            "z_sum=declare_sums(z_T.sum(), everywhere) * z_T.shape[0],",
        ),
        layout=TP_2,
        rule="X2",
    ),
    Bug(
        "B15c",
        "a loss is multiplied by the size of tp",
        edit(
            "layer.balance_losses",
            "z_sum=declare_sums(z_T.sum(), everywhere),",
            "z_sum=declare_sums(z_T.sum(), everywhere) * mesh[TP].size,",
        ),
        layout=TP_2,
        values=True,
    ),
    Bug(
        "B35a",
        "choices are counted in forward, so an evaluation counts too",
        edit("layer.moe", IN_BACKWARD, "pass")
        + edit(
            "layer.moe",
            "        losses = self._loss_terms(x, frame, routing, mask_T)",
            "        self.router.seen_E += declare_sums(\n"
            "            routing.counts_E, [self.mesh[role] for role in DENSE]\n        )\n"
            "        losses = self._loss_terms(x, frame, routing, mask_T)",
        ),
        target="step",
        layout=TP_2,
        open="none: one process counts the same; tests/layer/test_counters.py counts",
    ),
    Bug(
        "B35b",
        "the counter holds this rank's own, not a part of a sum",
        edit("layer.moe", IN_BACKWARD, "self.router.seen_E += routing.counts_E"),
        target="step",
        layout=TP_2,
        rule="types",
    ),
    Bug(
        "B43a",
        "the random numbers of a weight do not depend on which experts the rank has",
        edit("train.init_weights", '{stream}/{place[0] + i}"', '{stream}/{i}"'),
        open="none: weights are given to every check, not drawn; "
        "tests/train/test_init_weights.py draws",
    ),
]
