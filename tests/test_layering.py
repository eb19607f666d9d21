"""The house rules that a machine can keep: order of files, sizes, who talks to whom, names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

import spmd_moe

PACKAGE = Path(spmd_moe.__file__).parent
ROOT = PACKAGE.parent

# A folder imports only from the folders above it, a file only from the files before it.
FOLDERS = {
    "core": "messages errors spmd_types_compat placement declare_placements shard_shape validate "
    "mesh_degrees host_values torch_modes compute_dtype float32_matmul per_rank_work "
    "check_gpu ranks_agree bind_roles mesh moves autograd_function collectives redistribute",
    "layer": "routing_faults router_logits router_scores router_config router_noise router "
    "permute copy_rows scaled_rows combine dispatch.forecast dispatch.protocol dispatch.local "
    "dispatch.ragged_exchange dispatch.all_to_all dispatch.dedup_all_to_all "
    "dispatch.all_gather dispatch.fixed_capacity dispatch.default_dispatcher dispatch "
    "activations boundary moe_config grouped_mm_support grouped_matmul choose_matmul grouped_ffn "
    "experts shared_experts balance_losses selection_bias check_inputs "
    "moe_output moe expert_load",
    "train": "recompute obligations storage_mesh init_weights reduced_gradients gradients "
    "parallelize hang_stack hang_report hang_watch checkpoint.strict_json "
    "checkpoint.safetensors_file checkpoint.optimizer_json checkpoint.rank_parts "
    "checkpoint.index checkpoint.random_state checkpoint.on_disk checkpoint.planners "
    "checkpoint.check_before_plan checkpoint.save_load checkpoint.convert checkpoint",
    "hf": "safetensors_slices element_map family_activations family families_softmax "
    "families_sigmoid families names_on_disk block find_blocks checkpoint_layout "
    "read_checkpoint write_checkpoint pooled_loss model_methods swap",
    "signatures": "allow_comments declared_tensors annotated_functions interception",
    "sanitize": "tensor_digest observe_functions compare_ranks gradient_sums watch_job",
    "check": "rules mirror_world dim_labels dim_parts follow_sharded_dims target load_target "
    "signatures findings check_declarations checker_escapes layouts source_lines tensor_origin "
    "record random_draws observer "
    "trace compare_coordinates thread_ranks whole_tensors compare_one_process "
    "check_layout parity.axis_groups parity.placement_words parity.cpu_stand_ins "
    "parity.held_elements parity.built_target parity.cannot_compare parity.weights "
    "parity.run_one_process parity.run_one_rank parity.processes parity.run_all_ranks "
    "parity.explain parity.compare parity.merge_findings parity.sweep parity.report "
    "parity.parity adapters.import_framework adapters.transformers_blocks "
    "adapters.torchtitan_shardings adapters.torchtitan_moe adapters.deepspeed_autoep "
    "adapters.deepspeed_moe adapters.megatron_moe adapters reports forecast plan supervise run "
    "subcommands parity.command parity command_check command_plan command_convert "
    "command_types command_line",
    "static": "kinds operator_rules error_codes placed_types generic_placements role_names "
    "annotations syntax_tree messages collective_calls torch_names error_report "
    "end_of_module refill_syntax_tree daemon reassigned_names problems_found expression_hooks "
    "builtin_calls "
    "module_calls torch_modules settings call_arguments branch_placements check_declared "
    "override_placements strict_mode strict_code review_module hook_table plugin_entry "
    "coverage run_types",
    "tooling": "write_ops_json",
}
ORDER = [
    name
    for folder, files in FOLDERS.items()
    for name in [*(f"{folder}.{file}" for file in files.split()), folder]
]
ORDER += ["mypy_plugin", "__main__"]
LAYER = [name for name in ORDER if name.startswith("layer.")]
STORED = ["obligations", "storage_mesh", "gradients", "parallelize", "hang_watch"]
_FILES = "rank_parts random_state on_disk planners check_before_plan save_load convert"
STORED += [f"checkpoint.{name}" for name in _FILES.split()]
LONGEST = 400


def sources() -> dict[str, str]:
    """Every module of the package, by its dotted name below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text()
    found.pop("__init__", None)
    return found


def imported(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spmd_moe"):
            module = (node.module or "").removeprefix("spmd_moe").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                yield inner if inner in ORDER else module
        if isinstance(node, ast.Import):
            yield from (a.name[9:] for a in node.names if a.name.startswith("spmd_moe."))


def upward_imports(files: dict[str, str]) -> list[str]:
    place = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{name} imports {other}"
        for name, source in files.items()
        for other in imported(source)
        if place[other] >= place[name]
    ]


def test_every_file_has_a_place() -> None:
    assert sorted(sources()) == sorted(ORDER)


def test_imports_only_point_backwards() -> None:
    assert upward_imports(sources()) == []


def test_the_import_rule_can_fail() -> None:
    below, above = "import spmd_moe.layer.moe\n", "from spmd_moe.core.mesh import Axis\n"
    files = {"core.shard_shape": above, "core.mesh": below, "layer.combine": above}
    assert upward_imports(files) == [
        "core.shard_shape imports core.mesh",
        "core.mesh imports layer.moe",
    ]


def python_files() -> list[Path]:
    folders = ("spmd_moe", "tests", "examples", "typecheck", "docs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_tensor_of_the_layer_goes_unchecked() -> None:
    """Except rows of any kind that are moved by an index, and a file that only names others."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["spmd_moe"]["strict"]
    strict = [name.removeprefix("spmd_moe.") for name in listed]
    loose = [name for name in LAYER if not any(fnmatch(f"{name}.", f"{s}.") for s in strict)]
    any_kind = ["layer.permute", "layer.copy_rows"]
    no_tensor = ["layer.dispatch"]
    assert sorted(loose) == sorted(any_kind + no_tensor)


def test_files_fit_in_a_head() -> None:
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python_files()}
    assert {name: size for name, size in sizes.items() if size > LONGEST} == {}


def test_ascii_only() -> None:
    paths = [*python_files(), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "llms.txt"]
    assert [str(p) for p in paths if not p.read_text().isascii()] == []


# --- who talks to torch.distributed, and to the checker ---------------------------------------

TALKS = re.compile(
    r"^\s*(?:import torch\.distributed|from torch\.distributed[\w.]* import (?!Proc))", re.M
)
CHECKER = re.compile(
    r"assert_type|is_type_checking|(?<!spmd_)typecheck\(|mutate_type|TYPE_CHECKING\b"
)
QUOTED_AXIS = re.compile(r"""["'](?:dp|cp|tp|edp|ep|etp)["']""")


def test_few_files_talk_to_torch_distributed() -> None:
    """collectives moves tensors, host says bytes; mesh makes groups; three ask where they stand,
    and followed whose a tensor is.

    Whole models are stored as DTensors: their files know the names of those. The sanitizer asks.
    """
    files = {n: s for n, s in sources().items() if n.partition(".")[0] != "check"}
    talking = [name for name, source in files.items() if TALKS.search(source)]
    core = "moves collectives torch_modes host_values mesh bind_roles per_rank_work redistribute "
    core += "check_gpu ranks_agree"
    allowed = [f"core.{name}" for name in core.split()] + [f"train.{name}" for name in STORED]
    allowed += ["hf.write_checkpoint"]
    allowed += ["sanitize.compare_ranks", "sanitize.gradient_sums"]
    assert sorted(talking) == sorted(allowed)
    moving = [n for n, s in files.items() if re.search(r"funcol\.|dist\.(all|reduce|broad)", s)]
    assert sorted(moving) == ["core.collectives", "core.host_values", "core.moves"]


def test_layer_code_has_no_statement_for_a_checker() -> None:
    assert [name for name in LAYER if CHECKER.search(sources()[name])] == []


def test_one_file_is_not_followed_by_a_checker() -> None:
    files = {n: s for n, s in sources().items() if n.partition(".")[0] not in ("check", "static")}
    found = [name for name, source in files.items() if "@register_no_typecheck" in source]
    assert found == ["core.host_values"]


def test_layer_code_does_not_name_axes() -> None:
    """Names belong to the user; the layer knows roles."""
    assert [name for name in LAYER if QUOTED_AXIS.search(sources()[name])] == []


LOADED = "import sys, spmd_moe.{}; sys.exit('spmd_moe.check' in sys.modules)"


def test_the_layer_never_loads_the_checker() -> None:
    assert python(LOADED.format("layer.moe")) == 0


def test_the_proof_that_it_does_not_can_fail() -> None:
    assert python(LOADED.format("check")) == 1


def test_these_rules_can_fail() -> None:
    assert TALKS.search("import torch.distributed as dist")
    assert CHECKER.search("spmd.assert_type(x, {})") and QUOTED_AXIS.search("mesh['tp']")


# --- shape letters ----------------------------------------------------------------------------

SUFFIX = re.compile(r"\b[a-z]\w*?_(?=[A-Za-z]{1,3}\b)(?=[a-z]*[A-Z])([A-Za-z]{1,3})\b")


def undefined_letters(source: str) -> set[str]:
    """Letters of shape suffixes that the legend at the head of the file does not define."""
    used = {letter for suffix in SUFFIX.findall(source) for letter in suffix}
    legend = "\n".join(line for line in source.splitlines() if line.startswith("#"))
    return {
        letter for letter in used if not re.search(rf"(?:^#|\s){letter}\s\s\w|\b{letter}, ", legend)
    }


@pytest.mark.parametrize("name", LAYER)
def test_shape_letters_are_defined_where_they_are_used(name: str) -> None:
    assert undefined_letters(sources()[name]) == set()


def test_the_legend_rule_can_fail() -> None:
    assert undefined_letters("#   T  tokens\nx_TD = 1\n") == {"D"}


# --- the public surface -----------------------------------------------------------------------


def names_for_checkers() -> set[str]:
    """What the branch that mypy reads exports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in branch.body if isinstance(node, ast.ImportFrom))
    return {alias.asname or "" for node in imports for alias in node.names}


def exported() -> list[str]:
    """What the branch that runs exports; mypy does not see it."""
    names: list[str] = vars(spmd_moe)["__all__"]
    return names


def test_both_branches_export_the_same_names() -> None:
    assert names_for_checkers() == set(exported())


def test_every_name_can_be_imported_also_after_its_file() -> None:
    for name in exported():
        value = getattr(spmd_moe, name)
        assert not isinstance(value, type(sys)), name
    import_module("spmd_moe.sanitize")
    assert callable(spmd_moe.sanitize)


def test_the_public_surface_is_small() -> None:
    """What only signatures mention is imported from its module."""
    assert len(exported()) <= 75


def test_dir_lists_the_public_names() -> None:
    assert {*exported(), "__version__"} <= set(dir(spmd_moe))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'spmd_moe' has no attribute 'Tokns'"):
        _ = spmd_moe.Tokns  # type: ignore[attr-defined]  # a typo on purpose


def python(program: str) -> int:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode


def test_importing_the_package_loads_no_torch() -> None:
    assert python("import spmd_moe, sys; sys.exit('torch' in sys.modules)") == 0
    assert python("from spmd_moe import TP; import sys; sys.exit('torch' in sys.modules)") == 1
