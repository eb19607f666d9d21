"""Error codes of the static check, one row each: one family, silenced together or one by one."""

from __future__ import annotations

from mypy.errorcodes import ErrorCode

from spmd_moe.check.rules import WORDS, Level, Rule, rules_table

_CATEGORY = "spmd_moe"
PLACEMENT = ErrorCode("placement", "Any error of the static check of placements", _CATEGORY)


def _row(word: str, level: Level, demands: str, *, allow: bool = True) -> tuple[str, Rule]:
    return word, Rule(f"placement-{word}", word, demands, (level,), (word,) if allow else ())


# By the word that `# spmd: allow` takes. The documentation prints these rows.
STATIC_RULES: dict[str, Rule] = dict(
    (
        _row(
            "annotation",
            "static",
            "a `Placed[...]` is a tensor with a kind on each of some roles",
        ),
        _row(
            "operation",
            "static",
            "the kinds that an operation takes go together: no P in a nonlinear one",
        ),
        _row("argument", "static", "an argument is placed as the parameter is declared"),
        _row("return", "static", "a result is placed as the function is declared"),
        _row("assignment", "static", "a value is placed as the variable or attribute is declared"),
        _row(
            "branch",
            "static",
            "one name, or one expression, has the same placement on all branches",
        ),
        _row(
            "move",
            "static",
            "a collective gets the kind that it takes, and gives a kind that it can give",
        ),
        _row("override", "static", "a method is placed like the one that it overrides"),
        _row("unknown", "strict", "something is known of every tensor"),
        _row(
            "size",
            "strict",
            "no rank, value or shape of a tensor decides what is cut, made or sent",
        ),
        _row(
            "bypass",
            "strict",
            "nothing that a checker cannot follow, such as a raw collective or `detach`",
        ),
        _row(
            "allow",
            "static",
            "a comment that allows something gives a reason, and something to allow",
            allow=False,
        ),
    )
)
# What such comments allow the traced check, which reads the same lines.
TRACED = WORDS
CODES: dict[str, ErrorCode] = {
    name: ErrorCode(rule.id, rule.demands, _CATEGORY, sub_code_of=PLACEMENT)
    for name, rule in STATIC_RULES.items()
}


def codes_table() -> str:
    """The rows in Markdown, as the documentation shows them."""
    return rules_table(STATIC_RULES.values())
