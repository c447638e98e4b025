"""What can go wrong when a Metal kernel is executed by the host runtime."""

from __future__ import annotations


class MetalHostError(RuntimeError):
    """Base of all errors here."""


class HostUnavailable(MetalHostError):
    """This machine cannot run the host runtime (no ziglang, or not Linux on x86-64)."""


class LintError(MetalHostError):
    """The kernel text breaks a rule of Metal, or of this project, that clang does not check."""


class CompileError(MetalHostError):
    """clang rejected the kernel; the message holds its diagnostics."""


class KernelFault(MetalHostError):
    """The kernel did something wrong while it ran.

    Attributes:
        kind: one of FAULT_KINDS, for programs; the message is for people.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"[{kind}] {message}")
        self.kind = kind


# In the order of `enum Code` in runtime/runtime.h.
FAULT_KINDS = (
    "ok",
    "divergent simd operation",
    "divergent barrier",
    "out of bounds",
    "write to input",
    "misaligned",
    "race",
    "uninitialised read",
    "unwritten output",
    "threadgroup memory",
    "division by zero",
    "timeout",
    "crash",
)
