"""Triton, or what stands for it where it is missing: kernels are then defined, and never called."""
# mypy: disable-error-code="no-untyped-def,misc,unused-ignore"

from __future__ import annotations

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:
    tl = None

    class triton:  # type: ignore[no-redef] # noqa: N801
        """Stands for the package."""

        @staticmethod
        def jit(function=None, **options):
            """The function as it is."""
            return function or (lambda decorated: decorated)


__all__ = ["tl", "triton"]
