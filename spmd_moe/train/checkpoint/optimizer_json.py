"""What the index says about an optimizer: settings of its groups, and the state of each parameter.

    [{"settings": {"lr": 0.01, "betas": [0.9, 0.999], ...},
      "state": {"router.weight_ED": {"exp_avg": {"like_parameter": true, "dtype": "float32"},
                                     "step": {"like_parameter": false, "dtype": "float32"}}}}]

A tensor of the state is stored as a tensor under `optimizer:router.weight_ED:exp_avg`. Everything
is checked before it reaches the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from spmd_moe.core.errors import CheckpointError, explain
from spmd_moe.train.checkpoint.safetensors_file import DTYPE_NAMES
from spmd_moe.train.checkpoint.strict_json import Json

# Of each parameter: the settings of its group, and its state.
ByName: TypeAlias = dict[str, tuple[dict[str, Json], dict[str, Json]]]

_DTYPES = {str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES}


def saved_by_name(saved: Json) -> ByName:
    """The groups of a checkpoint, once they are known to be such; empty without an optimizer."""
    by_name: ByName = {}
    _need(saved is None or isinstance(saved, list), "the list of groups")
    for group in saved or ():
        fits = isinstance(group, dict) and group.keys() == {"settings", "state"}
        _need(fits, "a group without settings and state")
        settings, state = group["settings"], group["state"]
        fits = isinstance(settings, dict) and isinstance(state, dict)
        _need(fits and "params" not in settings, "the settings of a group")
        for name, kept in state.items():
            _need(name not in by_name, f"{name!r}, which is in two groups")
            fits = isinstance(kept, dict) and all(map(_is_state, kept.values()))
            _need(fits, f"the state of {name!r}")
            by_name[name] = settings, kept
    return by_name


def _is_state(kept: Json) -> bool:
    if not isinstance(kept, dict):
        return False
    if kept.keys() == {"value"}:
        return _is_plain(kept["value"])
    fits = kept.keys() == {"like_parameter", "dtype"}
    fits = fits and type(kept["like_parameter"]) is bool and type(kept["dtype"]) is str
    return fits and kept["dtype"] in _DTYPES


def _is_plain(value: Json) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_settings(
    saved: Mapping[str, Json], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Raise if a saved setting is not of the kind that the optimizer has: number, flag or word.

    Numbers among the optimizer's defaults, such as `lr`, must be there. Flags may be missing,
    since a later version of torch can have more of them.
    """
    for key, value in defaults.items():
        numbers = isinstance(value, int | float | tuple | Tensor) and not isinstance(value, bool)
        _need(not numbers or key in saved, f"the setting {key!r}, which is missing")
    for key, value in saved.items():
        fits = _is_plain(value) and (key not in now or _like(value, now[key]))
        _need(fits, f"the setting {key!r}")


def _like(saved: Json, now: Any) -> bool:
    if isinstance(now, tuple | list):
        same = isinstance(saved, list) and len(saved) == len(now)
        return same and all(map(_like, saved, now))
    if isinstance(now, str):
        return isinstance(saved, str)
    if isinstance(now, bool) or now is None:
        return isinstance(saved, bool | None) or (now is None and _is_number(saved))
    return _is_number(saved)


def _is_number(value: Json) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def plain(value: Any, of: str, key: str) -> Json:
    """A setting or a state as JSON."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, tuple | list):
        return [plain(v, of, key) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise unknown_state(f"{type(value).__name__} of {of!r} {key!r}")


def unknown_state(what: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "save_checkpoint",
            f"the optimizer has a state that cannot be stored: {what}",
            why="it is neither a number nor of the shape of its parameter",
            fixes=["optimizer=None   # weights only"],
        )
    )


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise CheckpointError(
            explain(
                "load_checkpoint",
                f"the index describes no state of this optimizer: wrong is {what}",
                why="settings and states are used as stored, so each must be of its own kind",
                fixes=["an earlier checkpoint", "optimizer=None   # weights only"],
            )
        )


def give_settings(group: dict[str, Any], saved: Mapping[str, Json]) -> None:
    """Set those of a checkpoint in a group of the optimizer."""
    for key, value in saved.items():
        now = group.get(key)
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(now, tuple) else value
