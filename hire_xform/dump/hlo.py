"""What a compiled program moves, read off its HLO text: bytes in and out of memory, steps, cycles, and large arrays.

XLA's own count has a loop's body once, and, on some platforms, the whole of a matrix of which a few rows are taken.
Here a body counts as often as it runs, where that is known; of what is sliced or gathered only what is taken counts,
also inside fusions; what is updated in place counts as the update; and what lies in a TPU's VMEM does not move. Of our
kernels the rows that an index chooses count. Of branches the one that moves most counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ESTIMATE = re.compile(r'"bytes_accessed":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# The name of a kernel inside a call whose target is its compiler.
_INNER = re.compile(r'[ {,]name = "([^"]*)"|"kernel_name":"([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations=\{)=?%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+)")
# Take no time, and move nothing.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"opt-barrier", "copy-done", "slice-done", "async-done", "async-update", "iota", "domain", "add-dependency"}
)
# Calls that are no work: memory that is set aside, and parts that lie beside one another already.
_NOTHING = ("AllocateBuffer", "ConcatBitcast")
# The value of operand 0 under another shape.
_SAME = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))
_SCORES = re.compile(r"scores|products")
_ROWS = re.compile(r"select_(?:stored_)?rows|combine_(?:stored_)?rows")


@dataclass(frozen=True)
class Instruction:
    """One line: its name, its type as text, what it does, and to what."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @cached_property
    def nbytes(self) -> int:
        """Bytes of what it makes."""
        return bytes_of(self.type)

    @cached_property
    def called(self) -> list[str]:
        """The computations that it runs."""
        return [*_CALLED.findall(self.rest)]

    @cached_property
    def kernel(self) -> str:
        """Of a call of a kernel its name: that inside, where the target is only what compiles it."""
        inner, target = _INNER.search(self.rest), _TARGET.search(self.rest)
        found = (inner and (inner[1] or inner[2])) or (target and target[1])
        return found or self.name

    @cached_property
    def branches(self) -> list[str]:
        """Those of which it runs one."""
        found = [_NAME.findall(a) or [b] for a, b in _BRANCHES.findall(self.rest)]
        return [name for names in found for name in names]


@dataclass
class Counts:
    """What runs, bodies of loops as often as they do.

    Attributes:
      read, written: bytes.
      steps: what is launched, one after the other: kernels, on a GPU.
      cycles: by the compiler's own estimate, where it makes one; bodies times their runs.
      endless: loops of which it is not known how often they run: once here.
      largest: arrays that are written, and the bytes that are written of each over all runs.
      kernels: calls that are not the compiler's own work, by name, and how often they run.
    """

    read: float = 0
    written: float = 0
    steps: int = 0
    cycles: float = 0
    endless: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> float:
        """Bytes in and out."""
        return self.read + self.written

    def add(self, other: Counts, times: int = 1) -> None:
        """Adds so many runs of another."""
        self.read += times * other.read
        self.written += times * other.written
        self.steps += times * other.steps
        self.cycles += times * other.cycles
        self.endless += other.endless
        for name, size in other.largest.items():
            self.largest[name] = self.largest.get(name, 0) + times * size
        for name, runs in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0) + times * runs


def counts(text: str) -> Counts:
    """What a compiled program does, by its text (``compiled.as_text()``)."""
    program = _Program(text)
    return program.of(program.entry)


def bytes_of(text: str, in_memory: bool = False) -> int:
    """Bytes of a type as HLO writes it; with ``in_memory`` only of arrays that lie in the device's memory."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(text):
        if in_memory and re.search(r"S\([1-9]\)", layout):
            continue
        total += math.prod(int(d) for d in dims.split(",") if d) * _bits(kind) / 8
    return math.ceil(total)


def _bits(kind: str) -> int:
    found = re.match(r"[a-z]+?(\d+)", kind)
    return _BITS[kind] if kind in _BITS else int(found[1]) if found else 0


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        self._known: dict[str, Counts] = {}
        name = ""
        for line in text.splitlines():
            if (
                line.endswith("{")
                and (header := re.match(r"(ENTRY )?%?([\w.\-]+) ?[(:]?.*\{$", line))
                and line[0] != " "
            ):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else self.entry
            elif name and (found := _instruction(line)) is not None:
                self.computations[name][found.name] = found
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = found.name

    def of(self, name: str) -> Counts:
        """What a run of a computation does."""
        if name not in self._known:
            total = self._known[name] = Counts()
            for one in self.computations.get(name, {}).values():
                self._add(total, name, one)
        return self._known[name]

    def _add(self, total: Counts, where: str, one: Instruction) -> None:
        if one.opcode == "while":
            trips = self._trips(one)
            total.endless += trips is None
            for body in re.findall(r"body=%([\w.\-]+)", one.rest):
                total.add(self.of(body), trips or 1)
        elif one.branches:
            total.add(max((self.of(name) for name in one.branches), key=lambda c: c.moved))
        elif one.opcode in ("call", "async-start"):
            for called in one.called:
                total.add(self.of(called))
        elif one.opcode not in _FREE and not any(f'custom_call_target="{name}"' in one.rest for name in _NOTHING):
            read, written = self._moved(where, one)
            cycles = _CYCLES.search(one.rest)
            # A number in a TPU's scalar memory is made beside whatever else runs.
            own = Counts(read, written, int("S(6)" not in one.type), int(cycles[1]) if cycles else 0, 0)
            if written:
                own.largest = {re.sub(r"\{[^}]*\}", "", f"{one.type} {one.name}"): written}
            if one.opcode == "custom-call":
                own.kernels = {one.kernel: 1}
            total.add(own)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: what the compiler says, or the number that its counter, from 0 on, stays below."""
        if (known := _TRIPS.search(loop.rest)) is not None:
            return int(known[1])
        for name in re.findall(r"condition=%([\w.\-]+)", loop.rest):
            inside = self.computations.get(name, {})
            root = inside.get(self.roots.get(name, ""))
            if root is not None and root.opcode == "compare" and "direction=LT" in root.rest:
                limit = inside.get(root.operands[1])
                if limit is not None and limit.opcode == "constant" and (number := re.match(r"\d+", limit.rest)):
                    return int(number[0])
        return None

    def _moved(self, where: str, one: Instruction) -> tuple[float, float]:
        """Bytes that an instruction reads and writes."""
        inside = self.computations[where]
        types = [inside[name].type if name in inside else "" for name in one.operands]
        sizes = [bytes_of(t, in_memory=True) for t in types]
        out = bytes_of(one.type, in_memory=True)
        if one.opcode == "copy-start":
            return sum(sizes), bytes_of(re.sub(r"^\((.*?[\]}]), .*", r"\1", one.type), in_memory=True)
        if one.opcode == "slice-start":
            # Its type is that of what is sliced, of what is taken, and of what waits for it.
            part = [found[0] for found in _ARRAY.finditer(one.type)][len(one.operands)]
            return bytes_of(part), bytes_of(part, in_memory=True)
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return min(sizes[0], one.nbytes) + sum(sizes[1:]), out
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = bytes_of(types[1 if one.opcode[0] == "d" else -1])
            return update + sum(sizes[2:]), update
        if one.opcode == "broadcast":
            return sum(sizes), out
        if one.opcode == "custom-call":
            return self._of_kernel(one, types, sizes), out
        if one.opcode == "fusion" and one.called:
            taken = self._taken(one.called[0])
            read = sum(min(size, taken.get(i, size)) for i, size in enumerate(sizes))
            return read, min(out, self._updated(one.called[0], out))
        return sum(sizes), out

    def _taken(self, name: str) -> dict[int, float]:
        """Of the parameters of a fusion that are only sliced or gathered from: bytes that are taken."""
        inside = self.computations[name]
        users: dict[str, list[Instruction]] = {}
        for one in inside.values():
            for operand in one.operands:
                users.setdefault(operand, []).append(one)
        found = {}
        for one in inside.values():
            if one.opcode == "parameter":
                size = self._taken_of(one.name, users, bytes_of(one.type))
                if size is not None:
                    found[int(re.findall(r"^\d+", one.rest)[0])] = size
        return found

    def _taken_of(self, name: str, users: dict[str, list[Instruction]], whole: int) -> float | None:
        total = 0.0
        for one in users.get(name, []):
            first = one.operands[:1] == (name,) and name not in one.operands[1:]
            if first and one.opcode in ("dynamic-slice", "gather", "slice"):
                total += one.nbytes
            elif first and one.opcode == "dynamic-update-slice":
                total += 0
            elif first and (one.opcode in _SAME or self._is_a_copy(one)):
                deeper = self._taken_of(one.name, users, whole)
                if deeper is None:
                    return None
                total += deeper
            elif one.opcode == "fusion" and one.called:
                taken = self._taken(one.called[0])
                sizes = [taken.get(i) for i, operand in enumerate(one.operands) if operand == name]
                if any(size is None for size in sizes):
                    return None
                total += sum(size for size in sizes if size is not None)
            else:
                return None
        return min(total, whole)

    def _is_a_copy(self, one: Instruction) -> bool:
        """Whether a fusion gives its operand another layout, and nothing else: then it is never written."""
        inside = self.computations.get(one.called[0], {}) if one.opcode == "fusion" and one.called else {}
        return bool(inside) and all(each.opcode == "parameter" or each.opcode in _SAME for each in inside.values())

    def _updated(self, name: str, out: float) -> float:
        """Bytes that a fusion writes whose root updates a part of an operand in place."""
        inside, root = self.computations[name], self.roots.get(name, "")
        one = inside.get(root)
        while one is not None and one.opcode == "bitcast":
            one = inside.get(one.operands[0])
        if one is not None and one.opcode == "dynamic-update-slice":
            update = inside.get(one.operands[1])
            return update.nbytes if update is not None else out
        return out

    def _of_kernel(self, one: Instruction, types: Sequence[str], sizes: Sequence[int]) -> float:
        """What a kernel reads: its own estimate, the rows that an index chooses, or all of its operands."""
        estimate = _ESTIMATE.search(one.rest)
        if estimate:
            # An estimate has all operands and results in memory.
            here = sum(bytes_of(t) for t in types) - sum(sizes)
            return max(0, int(estimate[1]) - bytes_of(one.type) - here)
        indices = [i for i, t in enumerate(types) if t.startswith("s32[")]
        wide, made = _dims(types[0]), _dims(one.type)
        scored = bool(_SCORES.search(one.kernel) and made)
        if scored:
            rows = made[-1]  # of a stack, one matrix
        elif _ROWS.search(one.kernel) and indices:
            # Rows are `group` to an index: of the products that are made, or of the factors that are given.
            last, index = made if "select" in one.kernel else wide, _dims(types[indices[-1]])
            rows = math.prod(index) * (max(1, last[-1] // max(1, index[-1])) if last else 1)
        else:
            return sum(sizes)
        total = 0.0
        for kind, size in zip(types, sizes, strict=True):
            dims = _dims(kind)
            # An index is int32, and so are words of a matrix in few bits.
            is_matrix = (scored or kind[:3] != "s32") and len(dims) == 2 and dims[0] > rows
            total += size / dims[0] * rows if is_matrix else size
        return total


def _dims(text: str) -> list[int]:
    found = _ARRAY.search(text)
    return [int(d) for d in found[2].split(",") if d] if found else []


def _instruction(line: str) -> Instruction | None:
    name, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    opcode = _OPCODE.search(f" {right}") if equals else None
    if opcode is None:
        return None
    start = opcode.end() - 1
    end, depth = start, 1
    while end < len(right) and depth:
        depth += {"(": 1, ")": -1}.get(right[end], 0)
        end += 1
    given = right[start : end - 1]
    rest = given + right[end:] if opcode[1] in ("parameter", "constant") else right[end:]
    kind = right[: max(0, opcode.start() - 1)].strip()
    return Instruction(name.strip().lstrip("%"), kind, opcode[1], tuple(_NAME.findall(given)), rest)
