"""PyTorch on the CPU: f32, bf16, and its own dynamic int8."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.speed.cases import Case, Ops, Weights, model, rows_out
from benchmarks.speed.peers import BF16, EXACT, INT8, Kernel, Left, Settings
from benchmarks.speed.timing import sets_for


def missing() -> str | None:
    """What to install."""
    return None if importlib.util.find_spec("torch") else "pip install torch, here or for --torch-python"


def _ops() -> Ops:
    import torch

    def norm(x: Any) -> Any:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-6)

    return Ops(
        relu=torch.relu,
        silu=torch.nn.functional.silu,
        # Of f32: that of bfloat16 has no vector loop.
        argmax=lambda logits: torch.argmax(logits.float(), dim=-1),
        softmax=lambda scores: torch.softmax(scores, dim=-1),
        einsum=torch.einsum,
        concatenate=lambda parts: torch.cat(parts, dim=1),
        norm=norm,
    )


def _linears(weights: Weights, kind: str) -> dict[str, Any]:
    """A module for each matrix."""
    import torch

    def linear(name: str) -> Any:
        matrix = torch.from_numpy(rows_out(name, weights.arrays[name]))
        module = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        module.weight = torch.nn.Parameter(matrix, requires_grad=False)
        if kind == "bf16":
            return module.to(torch.bfloat16)
        if kind == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize = torch.ao.quantization.quantize_dynamic
                return quantize(torch.nn.Sequential(module), {torch.nn.Linear}, dtype=torch.qint8)[0]
        return module

    return {name: linear(name) for name in weights.arrays}


def _another(module: Any, kind: str) -> Any:
    """A copy in memory of its own."""
    import copy

    if kind != "int8":
        return copy.deepcopy(module)
    other = type(module)(module.in_features, module.out_features, bias_=False)
    other.set_weight_bias(module.weight().clone(), None)
    return other


def _call(
    case: Case, ops: Ops, sets: list[dict[str, Any]], rest: Any, inputs: list[Any]
) -> Callable[[int], np.ndarray]:
    import torch

    def call(i: int) -> np.ndarray:
        linears = sets[i % len(sets)]
        with torch.inference_mode():
            result = model(case, ops, lambda x, name: linears[name](x), rest, inputs[i % len(inputs)])
            return (result if result.dtype == torch.int64 else result.float()).numpy()

    return call


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """Three."""
    import torch

    torch.set_num_threads(settings.threads)
    case, ops = weights.case, _ops()
    kinds = (("f32", 4, EXACT), ("bf16", 2, BF16), ("int8", 1, INT8))
    for kind, size, tolerance in kinds:
        name, read = f"PyTorch {'dynamic int8' if kind == 'int8' else kind}", size * case.elements
        turned = sum(array.nbytes for key, array in weights.arrays.items() if key.endswith("down"))
        count = sets_for(read, settings.apart)
        reason = settings.short_of(turned + read * (count - (kind == "f32")))
        if reason:
            yield Left(name, reason)
            continue
        first = _linears(weights, kind)
        sets = [first] + [{key: _another(linear, kind) for key, linear in first.items()} for _ in range(count - 1)]
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        rest = {key: torch.from_numpy(array).to(dtype) for key, array in {**weights.biases, **weights.cache}.items()}
        inputs = [torch.from_numpy(x).to(dtype) for x in weights.inputs]
        yield Kernel(name, read, read, _call(case, ops, sets, rest, inputs), tolerance)
