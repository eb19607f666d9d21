"""Annotated functions, read once for the sanitizer, the traced check and the static check.

Read in this order:

    declared_tensors      every tensor in an argument or result, with its declared placement
    annotated_functions   the annotated functions of a program
    interception          what runs in place of their calls, with no line in them
    allow_comments        `# spmd: allow <code> - <reason>`; needs no torch
"""
