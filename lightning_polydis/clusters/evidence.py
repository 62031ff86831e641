"""Stub while the rest is written."""

from __future__ import annotations

from typing import Any


class ClusterEvidence:
    """Stub."""

    def described(self, found: Any) -> list[str] | None:
        """Stub."""
        return None
