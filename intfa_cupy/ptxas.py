"""What the compiler's log says about registers, spills and lost performance."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["CompileReport", "FunctionReport", "parse_log"]


@dataclass(frozen=True)
class FunctionReport:
    """Resources of one function. Sizes are bytes; ``registers`` is 0 for a device function."""

    name: str
    entry: bool = True
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack_frame: int = 0
    static_smem: int = 0
    barriers: int = 0

    def __str__(self) -> str:
        kind = f"{self.registers} registers" if self.entry else "device function"
        text = f"{self.name}: {kind}, {self.static_smem} B static smem, {self.barriers} barriers"
        if self.stack_frame:
            text += f", {self.stack_frame} B stack"
        if self.spill_stores or self.spill_loads:
            text += f", SPILLS {self.spill_stores} B stored {self.spill_loads} B loaded"
        return text


@dataclass(frozen=True)
class CompileReport:
    """Parsed compile log.

    Attributes
    ----------
    entries : tuple of FunctionReport
        The ``__global__`` functions.
    functions : tuple of FunctionReport
        Device functions that were not inlined.
    warnings : tuple of str
        Compiler and ptxas warnings, and ptxas remarks with a code such as ``C7510``.
    raw : str
        The log.
    """

    entries: tuple[FunctionReport, ...] = ()
    functions: tuple[FunctionReport, ...] = ()
    warnings: tuple[str, ...] = ()
    raw: str = field(default="", repr=False, compare=False)  # it holds compile times

    def __getitem__(self, entry: str) -> FunctionReport:
        for report in self.entries:
            if report.name == entry:
                return report
        raise KeyError(entry)

    @property
    def spill_bytes(self) -> int:
        """Spill stores and loads of all functions."""
        return sum(f.spill_stores + f.spill_loads for f in (*self.entries, *self.functions))

    @property
    def serialized(self) -> tuple[str, ...]:
        """Remarks that say wgmma is serialised (C7509 to C7515: each wgmma waits for the one before)."""
        return tuple(w for w in self.warnings if "wgmma" in w and "serialized" in w)

    @property
    def setmaxnreg_ignored(self) -> tuple[str, ...]:
        """Remarks that say a register reallocation was dropped (C7504, C7508)."""
        return tuple(w for w in self.warnings if "setmaxnreg" in w and "ignored" in w)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that makes a kernel slower than it was meant to be; empty is good."""
        spills = tuple(
            f"{f.name}: spills {f.spill_stores} B stored, {f.spill_loads} B loaded"
            for f in (*self.entries, *self.functions)
            if f.spill_stores or f.spill_loads
        )
        return spills + self.serialized + self.setmaxnreg_ignored

    def __str__(self) -> str:
        lines = [str(f) for f in (*self.entries, *self.functions)]
        lines += [f"warning: {w}" for w in self.warnings]
        return "\n".join(lines) or "(nothing reported)"


_PREFIX = re.compile(r"ptxas\s*(?P<level>info|warning|error|fatal|\.)\s*(?::\s*|(?=\d))")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for '?([^\s']+)'?")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SMEM = re.compile(r"(\d+)(?:\+(\d+))? bytes smem")
_CODE = re.compile(r"\(C\d+\)")
_FRONT_END = re.compile(r"\S+\(\d+\): warning\b.*")


def parse_log(log: str) -> CompileReport:
    """Parse the log of NVRTC or of a stand-alone ptxas, both run with ``-v``."""
    found: dict[str, dict[str, int]] = {}
    entries: list[str] = []
    warnings: dict[str, None] = {}
    entry = function = ""
    for line in log.splitlines():
        prefix = _PREFIX.match(line)
        text = line[prefix.end() :] if prefix else line.strip()
        if match := _ENTRY.search(text):
            entry = function = match[1]
            entries.append(entry)
            found.setdefault(entry, {})
        elif match := _PROPERTIES.search(text):
            function = match[1]
            found.setdefault(function, {})
        elif (match := _FRAME.search(text)) and function:
            names = ("stack_frame", "spill_stores", "spill_loads")
            found[function].update(zip(names, map(int, match.groups()), strict=True))
        elif (match := _USED.search(text)) and entry:
            found[entry]["registers"] = int(match[1])
            if barriers := _BARRIERS.search(text):
                found[entry]["barriers"] = int(barriers[1])
            if smem := _SMEM.search(text):
                found[entry]["static_smem"] = int(smem[1]) + int(smem[2] or 0)
        elif (prefix and prefix["level"] == "warning") or _CODE.search(text) or _FRONT_END.match(text):
            warnings[text.strip()] = None
    return CompileReport(
        entries=tuple(FunctionReport(name, True, **found[name]) for name in dict.fromkeys(entries)),
        functions=tuple(FunctionReport(name, False, **v) for name, v in found.items() if name not in entries),
        warnings=tuple(warnings),
        raw=log,
    )
