"""Mutants of the layer that no check objects to, and why that is no hole."""

from __future__ import annotations

ARGUED: dict[str, str] = {}
