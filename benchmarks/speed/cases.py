"""What is measured: shapes, their weights and inputs, and the model that every framework runs with products of its own.

Only NumPy is needed here: workers of other frameworks read this, too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Tokens that attention of a whole step sees, besides its own.
CONTEXT = 64
# Of the units of a block about this share fires: the bias of each unit is so many deviations of what comes in.
BIAS = -1.6
NOISE = 0.05
INPUTS = 16


@dataclass(frozen=True)
class Case:
    """One shape. ``kind`` is head, ffn or step; a stack of blocks runs as one program."""

    group: str
    kind: str
    d: int
    vocab: int = 0
    m: int = 0
    layers: int = 0
    gated: bool = False
    activation: str = "relu"
    # Of attention, for steps.
    head_width: int = 128
    tokens: int = 1
    # What weights are stored in, a name of a dtype. Anything but f32 is for frameworks of JAX.
    stored: str = "float32"
    # Shares of the units that approximate blocks compute.
    active: tuple[float, ...] = (0.0625, 0.25)
    # Whether blocks run as a scan over stacked weights as well, as many models in JAX have their layers.
    scanned: bool = False

    @property
    def name(self) -> str:
        """In words."""
        words = {
            "head": f"head {self.vocab} x {self.d}",
            "ffn": f"{self.layers} blocks, d {self.d}, m {self.m}",
            "step": f"step, {self.layers} layers, d {self.d}, m {self.m}, head {self.vocab}",
        }[self.kind]
        if self.kind != "head":
            words += {"relu": ", ReGLU" if self.gated else ", ReLU", "silu": ", SwiGLU"}[self.activation]
        stored = "" if self.stored == "float32" else f", stored in {self.stored}"
        return words + (f", {self.tokens} tokens" if self.tokens > 1 else "") + stored

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every matrix: a row for each output, but ``down`` a row for each unit."""
        shapes = {}
        for i in range(self.layers):
            if self.kind == "step":
                shapes |= {f"{i}.{name}": (self.d, self.d) for name in "qkvo"}
            shapes |= {f"{i}.{name}": (self.m, self.d) for name in (("gate",) if self.gated else ()) + ("up", "down")}
        return shapes | ({"head": (self.vocab, self.d)} if self.vocab else {})

    @property
    def elements(self) -> int:
        """Numbers in all matrices."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def places(self) -> int:
        """How many equal parts a call has: blocks of a stack. Plots are of one."""
        return self.layers if self.kind == "ffn" else 1


@dataclass
class Weights:
    """Of a case: matrices by name, the factors of most of them, biases, caches and inputs."""

    case: Case
    arrays: dict[str, np.ndarray]
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    # Keys and values of what came before, ``[heads, CONTEXT, width of a head]``.
    cache: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[np.ndarray] = field(default_factory=list)


def make_weights(case: Case) -> Weights:
    """The same for every process: of rank d/8 and a little noise, so that predictors of low rank are good ones.

    No time depends on that, but what is proved and what agrees does.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))

    def noise(*shape: int) -> np.ndarray:
        # Of deviation 1. Uniform: five times as fast to draw as normal.
        drawn = rng.random(shape, np.float32)
        drawn -= np.float32(0.5)
        drawn *= np.float32(12**0.5)
        return drawn

    made = Weights(case, {})
    for name, (rows, columns) in case.shapes.items():
        kind = name.rpartition(".")[2]
        if kind in ("up", "gate", "head"):
            rank = max(1, columns // 8)
            left, right = noise(rows, rank), noise(rank, columns) * np.float32((rank * columns) ** -0.5)
            matrix = noise(rows, columns)
            matrix *= np.float32(NOISE * columns**-0.5)
            for start in range(0, rows, 8192):
                matrix[start : start + 8192] += left[start : start + 8192] @ right
            made.factors[name] = left, right
        else:
            matrix = noise(rows, columns)
            matrix *= np.float32((rows if kind == "down" else columns) ** -0.5)
        made.arrays[name] = matrix
    for i in range(case.layers):
        made.biases[f"{i}.bias"] = np.full(case.m, BIAS if case.activation == "relu" else 0.0, np.float32)
        if case.kind == "step":
            shape = (case.d // case.head_width, CONTEXT, case.head_width)
            made.cache |= {f"{i}.keys": noise(*shape), f"{i}.values": noise(*shape)}
    # Independent of the number of inputs before it, so that each token of a call differs.
    made.inputs = [noise(case.tokens, case.d) for _ in range(INPUTS)]
    return made


# A product: an input ``[tokens, in]`` and the name of a matrix to ``[tokens, out]``.
Product = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Ops:
    """What a framework calls the rest."""

    relu: Callable[[Any], Any]
    silu: Callable[[Any], Any]
    argmax: Callable[[Any], Any]
    softmax: Callable[[Any], Any]
    einsum: Callable[..., Any]
    concatenate: Callable[[list[Any]], Any]
    norm: Callable[[Any], Any]


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


NUMPY = Ops(
    relu=lambda h: np.maximum(h, 0),
    silu=lambda h: h / (1 + np.exp(-h)),
    argmax=lambda logits: np.argmax(logits, axis=-1),
    softmax=_softmax,
    einsum=np.einsum,
    concatenate=lambda parts: np.concatenate(parts, axis=1),
    norm=lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)),
)


def model(case: Case, ops: Ops, product: Product, rest: dict[str, Any], x: Any) -> Any:
    """The model of a case: token ids of a head and a step, what comes out of a stack of blocks.

    ``rest`` has biases and caches. The lookup of a token's row, one of the vocabulary's, is left out for all.
    """
    for i in range(case.layers):
        if case.kind == "step":
            x = x + _attention(case, ops, product, rest, i, ops.norm(x))
        normed = ops.norm(x)
        inner = product(normed, f"{i}.{'gate' if case.gated else 'up'}") + rest[f"{i}.bias"]
        hidden = (ops.relu if case.activation == "relu" else ops.silu)(inner)
        if case.gated:
            hidden = hidden * product(normed, f"{i}.up")
        x = x + product(hidden, f"{i}.down")
    if case.kind == "ffn":
        return x
    return ops.argmax(product(ops.norm(x), "head"))


def _attention(case: Case, ops: Ops, product: Product, rest: dict[str, Any], i: int, x: Any) -> Any:
    """One token's, over a cache of fixed length and itself."""
    q, k, v = (product(x, f"{i}.{name}").reshape(-1, 1, case.head_width) for name in "qkv")
    keys, values = ops.concatenate([rest[f"{i}.keys"], k]), ops.concatenate([rest[f"{i}.values"], v])
    weights = ops.softmax(ops.einsum("hqw,htw->hqt", q, keys) * case.head_width**-0.5)
    return product(ops.einsum("hqt,htw->hqw", weights, values).reshape(1, -1), f"{i}.o")


def reference(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What NumPy makes of an input, and the logits where there are some."""
    logits = None

    def product(x: np.ndarray, name: str) -> np.ndarray:
        nonlocal logits
        matrix = weights.arrays[name]
        result = x @ matrix if name.endswith("down") else x @ matrix.T
        logits = result if name == "head" else logits
        return result

    return model(weights.case, NUMPY, product, {**weights.biases, **weights.cache}, x), logits


def disagreement(result: np.ndarray, expected: np.ndarray, logits: np.ndarray | None) -> float:
    """How far a result is from NumPy's.

    For blocks the root mean square of the difference, of that of the expected. For token ids how much smaller than the
    largest their logits are, in standard deviations of the logits: the worst token's.
    """
    if logits is None:
        return float(np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2)))
    taken = np.take_along_axis(logits, np.asarray(result).reshape(-1, 1), axis=1)[:, 0]
    return float(np.max((logits.max(axis=1) - taken) / logits.std(axis=1)))


def rows_out(name: str, matrix: np.ndarray) -> np.ndarray:
    """A matrix with a row for each output, in memory of its own where that turns it."""
    return np.ascontiguousarray(matrix.T) if name.endswith("down") else matrix


def full() -> Iterator[Case]:
    """What ``make bench`` runs."""
    for vocab, d in ((32768, 576), (32768, 4096), (131072, 1024), (131072, 2048), (262144, 1152)):
        yield Case("heads", "head", d, vocab)
    for vocab in (2048, 8192, 32768):
        yield Case("growth", "head", 1024, vocab)
    everything = (0.05, 0.0625, 0.125, 0.25, 0.5)
    yield Case("blocks", "ffn", 1024, m=4096, layers=12, active=everything, scanned=True)
    yield Case("blocks", "ffn", 2048, m=8192, layers=4, active=everything)
    yield Case("blocks", "ffn", 4096, m=16384, layers=1)
    yield Case("blocks", "ffn", 2048, m=5632, layers=4, gated=True)
    yield Case("blocks", "ffn", 2048, m=5632, layers=4, gated=True, activation="silu", active=(0.25, 0.5))
    # The shape of SmolLM2-135M, but for its keys and values, which several heads share.
    yield Case("step", "step", 576, 49152, 1536, 30, gated=True, activation="silu", head_width=64, active=(0.5,))
    yield Case("step", "step", 2048, 131072, 8192, 4)
    yield from billion()
    for tokens in (2, 4, 8, 16):
        yield Case("tokens", "head", 1024, 131072, tokens=tokens)
    for tokens in (1, 2, 4, 8, 16):
        yield Case("tokens", "ffn", 2048, m=8192, layers=2, tokens=tokens)
    for stored in ("bfloat16", "float8_e4m3fn"):
        yield Case("stored", "head", 1024, 131072, stored=stored)
        yield Case("stored", "ffn", 1024, m=4096, layers=8, stored=stored, active=(0.125,))


def billion() -> Iterator[Case]:
    """``--billion``: a step of 1.07 billion parameters, by reckoning in 10 GB with JAX alone, 18 GB with all."""
    yield Case("step", "step", 2048, 131072, 8192, 16)


def quick() -> Iterator[Case]:
    """``--quick``: a minute, and a few hundred megabytes."""
    yield Case("heads", "head", 576, 32768)
    yield Case("blocks", "ffn", 1024, m=4096, layers=4, active=(0.0625, 0.25))
    yield Case("stored", "head", 576, 32768, stored="bfloat16")
    yield Case("step", "step", 512, 16384, 2048, 4, active=(0.0625,))
    yield Case("tokens", "head", 576, 32768, tokens=4)


def toy() -> Iterator[Case]:
    """``--toy``: seconds. For tests: nothing is far larger than a cache."""
    yield Case("heads", "head", 64, 512)
    yield Case("blocks", "ffn", 64, m=256, layers=2, active=(0.25,), scanned=True)
    yield Case("step", "step", 128, 512, 256, 1, active=(0.25,))


SIZES: dict[str, Callable[[], Iterator[Case]]] = {"full": full, "billion": billion, "quick": quick, "toy": toy}
