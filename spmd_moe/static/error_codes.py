"""The error codes of the static check: one family, silenced together or one by one."""

from __future__ import annotations

from mypy.errorcodes import ErrorCode

_CATEGORY = "spmd_moe"
PLACEMENT = ErrorCode("placement", "Any error of the static check of placements", _CATEGORY)

# Name, and what it says. The documentation prints this table.
MEANINGS: dict[str, str] = {
    "annotation": "a `Placed[...]` that is not a tensor with a kind on each of some roles",
    "operation": "an operation on kinds that do not go together, such as P in a nonlinear one",
    "argument": "an argument is not placed as the parameter is declared",
    "return": "a result is not placed as the function is declared",
    "assignment": "a value is not placed as the variable or attribute is declared",
    "branch": "one name, or one expression, has different placements on different branches",
    "move": "a collective on the wrong kind, to a kind that it does not give, or no collective",
    "override": "a method is placed differently from the one that it overrides",
    "unknown": "strict: a tensor of which nothing is known",
    "size": "strict: a rank, a value or a shape of a tensor decides what is cut, made or sent",
    "bypass": "strict: what a checker cannot follow, such as a raw collective or `detach`",
    "allow": "a comment that allows something gives no reason, or allows nothing",
}
# What such comments allow the traced check, which reads the same lines.
TRACED = {"detach", "raw", "no_grad", "sum", "rank", "size", "shard", "untyped"} | {
    "no_typecheck",
    "mutate_type",
}
CODES: dict[str, ErrorCode] = {
    name: ErrorCode(f"placement-{name}", meaning, _CATEGORY, sub_code_of=PLACEMENT)
    for name, meaning in MEANINGS.items()
}


def codes_table() -> str:
    """The table in Markdown, as the documentation shows it."""
    rows = [f"| `placement-{name}` | {meaning} |" for name, meaning in MEANINGS.items()]
    return "\n".join(["| code | reports |", "| --- | --- |", *rows])
