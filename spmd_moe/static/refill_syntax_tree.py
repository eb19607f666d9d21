"""Second reading of a file, into the syntax tree that was made of it.

Within one run the daemon keeps what it has parsed, and would analyse a tree twice that it checks
twice. It has no need to; but a module that was edited, and uses another that was, is checked after
each of them where it has placements.
"""

from __future__ import annotations

from pathlib import Path

from mypy.config_parser import parse_mypy_comments
from mypy.errors import Errors
from mypy.nodes import MypyFile, SymbolTable
from mypy.options import Options
from mypy.parse import parse
from mypy.renaming import LimitedVariableRenameVisitor, VariableRenameVisitor
from mypy.semanal_pass1 import SemanticAnalyzerPreAnalysis
from mypy.util import decode_python_encoding, get_mypy_comments, replace_object_state


def read_again(tree: MypyFile, options: Options) -> None:
    """The steps that mypy takes until it asks a plugin, without a word of what is wrong."""
    module, path = tree.fullname, tree.path
    source = decode_python_encoding(Path(path).read_bytes())
    changes, _ = parse_mypy_comments(get_mypy_comments(source), options)
    options = options.clone_for_module(module).apply_changes(changes)
    fresh = parse(source, path, module, Errors(options), options, eager=True)
    fresh._fullname, fresh.names = module, SymbolTable()
    if not options.native_parser:
        SemanticAnalyzerPreAnalysis().visit_file(fresh, path, module, options)
    if not fresh.is_stub and not options.allow_redefinition:
        fresh.accept(LimitedVariableRenameVisitor())
    if not fresh.is_stub and options.allow_redefinition_old:
        fresh.accept(VariableRenameVisitor())
    replace_object_state(tree, fresh)
