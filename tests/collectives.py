"""The collectives of a compiled program, and the bytes each device puts into them."""

import math
import re
from dataclasses import dataclass

_OPS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
_LINE = re.compile(rf"= (?P<type>\(.*?\)|\S+) (?P<op>{'|'.join(_OPS)})(?P<start>-start)?\((?P<rest>.*)")
# Whatever else says which devices it is between would be a collective that is not counted.
_BETWEEN_DEVICES = re.compile(r"\b(replica_groups|source_target_pairs|channel_id)=")
_COMPUTATION = re.compile(r"(?:ENTRY )?(%[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r" *(?:ROOT )?%[\w.-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\(")
# These name what is there already, or, as copy-done, what another instruction writes.
_WRITES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done"}
_CALLED = re.compile(r"\b(\w+)=(\{%[^}]*\}|%[\w.-]+)")
_ARRAY = re.compile(r"([a-z]+)(\d+)?[a-z0-9]*\[([\d,]*)\]")
_OF_VMEM = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}")


@dataclass(frozen=True)
class Collective:
    """One collective; ``sent`` is the bytes that each device contributes."""

    op: str
    sent: int


def _sizes(text):
    """Bytes of every array type in a text."""
    found = []
    for kind, bits, dims in _ARRAY.findall(text):
        size = 1 if kind == "pred" else int(bits or 32) // 8
        found.append(size * math.prod(int(d) for d in dims.split(",") if d))
    return found


def _group(rest):
    """Devices in a group of a collective."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    raise AssertionError(f"no replica groups in {rest}")


def collectives(compiled):
    """The collectives of a compiled program, in order."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _LINE.search(line)
        if match is None:
            assert not _BETWEEN_DEVICES.search(line), f"a collective of an unknown kind: {line.strip()}"
            continue
        sizes = _sizes(match["type"])
        if match["start"]:
            # The result of a start is its operands, its results, and some scalars of the machine's own.
            sizes = sizes[: max(1, len(sizes) // 2)] if match["op"] != "all-reduce" else sizes
            found.append(Collective(match["op"], sum(sizes)))
        elif match["op"] == "all-gather":
            found.append(Collective(match["op"], sum(sizes) // _group(match["rest"])))
        elif match["op"] == "reduce-scatter":
            found.append(Collective(match["op"], sum(sizes) * _group(match["rest"])))
        else:
            found.append(Collective(match["op"], sum(sizes)))
    return found


def largest_array(compiled):
    """Bytes of the largest array in a compiled program: what any one device holds at most at once."""
    return max(size for line in compiled.as_text().splitlines() for size in _sizes(line.split(" metadata=")[0]))


def arrays_written(compiled, in_branches=True, in_vmem=True):
    """Bytes of every array that an instruction of a compiled program writes; what a fusion keeps to itself is not.

    ``in_branches``: also those in the branches of conditionals, of which one is run.
    ``in_vmem``: also those that a TPU's compiler put into VMEM.
    """
    text = compiled.as_text()
    left_out = set(re.findall(r"calls=(%[\w.-]+)", text))
    if not in_branches:
        left_out |= _reached_from_branches(text)
    found, inside = [], None
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            inside = computation[1]
        match = _INSTRUCTION.match(line)
        if match is not None and inside not in left_out and match["op"] not in _WRITES_NOTHING:
            written = match["type"] if in_vmem else _OF_VMEM.sub("", match["type"])
            # Of a copy that has begun, the second is where it is from.
            found.extend(_sizes(written) if in_vmem or match["op"] != "copy-start" else _sizes(written)[1:])
    return found


def _reached_from_branches(text):
    """The computations that only a conditional's branch leads to."""
    refers, inside, queue = {}, None, []
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            inside = computation[1]
        for attribute, names in _CALLED.findall(line):
            called = re.findall(r"%[\w.-]+", names)
            refers.setdefault(inside, []).extend(called)
            if "branch" in attribute or attribute in ("true_computation", "false_computation"):
                queue += called
    found = set()
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += refers.get(name, [])
    return found
