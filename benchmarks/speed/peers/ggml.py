"""llama.cpp's products, Q8_0 and Q4_0, by ggml's own libraries: its loops, threads and repacking, driven by ctypes.

``npm install node-llama-cpp`` fetches libraries for this machine into
``node_modules/@node-llama-cpp/<platform>/bins/<platform>``, which is the folder to name.
"""

from __future__ import annotations

import ctypes as c
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.speed.cases import Case, Weights, rows_out
from benchmarks.speed.peers import INT4, INT8, Kernel, Left, Settings
from benchmarks.speed.timing import sets_for

F32, Q4_0, Q8_0 = 0, 2, 8
# Bytes of a block of 32 numbers: a scale of 16 bits, and the numbers.
BLOCK, BLOCK_BYTES = 32, {Q4_0: 18, Q8_0: 34}
HELP = "npm install node-llama-cpp, then --ggml FOLDER of its libggml files, or HIRE_GGML"

P, I64, SIZE, INT, FLOAT = c.c_void_p, c.c_int64, c.c_size_t, c.c_int, c.c_float


class _Init(c.Structure):
    _fields_ = (("size", SIZE), ("buffer", P), ("no_alloc", c.c_bool))


# Names and types of what is called: result, arguments.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (P, _Init),
    "ggml_new_tensor_2d": (P, P, INT, I64, I64),
    "ggml_new_tensor_3d": (P, P, INT, I64, I64, I64),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_add": (P, P, P, P),
    "ggml_relu": (P, P, P),
    "ggml_reglu_split": (P, P, P, P),
    "ggml_swiglu_split": (P, P, P, P),
    "ggml_rms_norm": (P, P, P, FLOAT),
    "ggml_argmax": (P, P, P),
    "ggml_reshape_2d": (P, P, P, I64, I64),
    "ggml_reshape_3d": (P, P, P, I64, I64, I64),
    "ggml_concat": (P, P, P, P, INT),
    "ggml_soft_max_ext": (P, P, P, P, FLOAT, FLOAT),
    "ggml_new_graph": (P, P),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_gallocr_new": (P, P),
    "ggml_gallocr_alloc_graph": (c.c_bool, P, P),
    "ggml_quantize_chunk": (SIZE, INT, P, P, I64, I64, I64, P),
    "ggml_threadpool_params_init": (None, P, INT),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_dev_backend_reg": (P, P),
    "ggml_backend_dev_buffer_type": (P, P),
    "ggml_backend_dev_init": (P, P, c.c_char_p),
    "ggml_backend_dev_supports_op": (c.c_bool, P, P),
    "ggml_backend_graph_compute": (INT, P, P),
    "ggml_backend_reg_get_proc_address": (P, P, c.c_char_p),
    "ggml_backend_tensor_set": (None, P, P, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, P, P, SIZE, SIZE),
    "ggml_backend_load_all_from_path": (None, c.c_char_p),
    "ggml_backend_dev_by_type": (P, INT),
}
_libraries: dict[str, Ggml] = {}


class Ggml:
    """The libraries of a folder and their CPU device, with so many threads."""

    def __init__(self, folder: str, threads: int) -> None:
        place = pathlib.Path(folder)
        paths = [next(iter(sorted(place.glob(f"{name}*.so")))) for name in ("libggml-base", "libggml.")]
        self._loaded = [c.CDLL(str(path), mode=c.RTLD_GLOBAL) for path in paths]
        for name, (result, *arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in self._loaded if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        # The best of the libraries for this processor's instructions, as llama.cpp chooses.
        self.backend_load_all_from_path(str(place).encode())
        self.device = self.backend_dev_by_type(0)
        self.backend, self.ordinary = (
            self.backend_dev_init(self.device, None),
            self.backend_dev_buffer_type(self.device),
        )
        self._threads, self._pool = threads, None

    def _found(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of the CPU's library."""
        address = self.backend_reg_get_proc_address(self.backend_dev_backend_reg(self.device), name.encode())
        return c.CFUNCTYPE(result, *arguments)(address)

    def wake(self) -> None:
        """A pool that lives on between calls, as llama.cpp has one."""
        if self._pool is None:
            params = c.create_string_buffer(4096)
            self.threadpool_params_init(params, self._threads)
            self._pool = self._found("ggml_threadpool_new", P, P)(c.addressof(params))
            self._found("ggml_backend_set_n_threads", None, P, INT)(self.backend, self._threads)
            self._found("ggml_backend_cpu_set_threadpool", None, P, P)(self.backend, self._pool)

    def idle(self) -> None:
        """Ends the pool: its threads look for work for a good while after a call, which would slow others."""
        if self._pool is not None:
            self._found("ggml_backend_cpu_set_threadpool", None, P, P)(self.backend, None)
            self._found("ggml_threadpool_free", None, P)(self._pool)
            self._pool = None

    def context(self) -> int:
        """For descriptions of tensors and graphs, which hold no data."""
        return self.init(_Init(16 << 20, None, True))

    def buffer_type(self, kind: int) -> int:
        """Where weights of a type lie: repacked for this processor's instructions where ggml can, as llama.cpp does."""
        types = self._found("ggml_backend_dev_get_extra_bufts", c.POINTER(P), P)(self.device)
        i = 0
        while types and types[i]:
            context = self.context()
            weight, x = self.new_tensor_2d(context, kind, 256, 64), self.new_tensor_2d(context, F32, 256, 1)
            buffer = self.backend_alloc_ctx_tensors_from_buft(context, types[i])
            fits = buffer and self.backend_dev_supports_op(self.device, self.mul_mat(context, weight, x))
            if fits:
                return types[i]
            i += 1
        return self.ordinary


def missing() -> str | None:
    """Where it is looked for is a setting, so that kernels say."""
    return None


def idle() -> None:
    """Lets others have the processors."""
    for library in _libraries.values():
        library.idle()


class Model:
    """One set of a case's weights and the graph on them."""

    def __init__(
        self, g: Ggml, case: Case, kind: int, buffer_type: int, data: dict[str, np.ndarray], rest: Any
    ) -> None:
        self.g, self.case = g, case
        held, small = g.context(), g.context()
        self.weights = {}
        for name, (rows, columns) in case.shapes.items():
            rows, columns = (columns, rows) if name.endswith("down") else (rows, columns)
            self.weights[name] = g.new_tensor_2d(held, kind, columns, rows)
        self.x = g.new_tensor_2d(small, F32, case.d, case.tokens)
        self.rest = {name: g.new_tensor_3d(small, F32, *reversed((1, 1, *a.shape)[-3:])) for name, a in rest.items()}
        g.backend_alloc_ctx_tensors_from_buft(held, buffer_type)
        g.backend_alloc_ctx_tensors_from_buft(small, g.ordinary)
        for name, array in (*data.items(), *rest.items()):
            self._set(self.weights.get(name) or self.rest[name], array)
        self.context = g.context()
        self.result = self._build()
        self.graph = g.new_graph(self.context)
        g.build_forward_expand(self.graph, self.result)
        if not g.gallocr_alloc_graph(g.gallocr_new(g.ordinary), self.graph):
            raise MemoryError(f"ggml has no room for the graph of {case.name}")

    def _set(self, tensor: int, array: np.ndarray) -> None:
        self.g.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def _product(self, x: int, name: str) -> int:
        return self.g.mul_mat(self.context, self.weights[name], x)

    def _build(self) -> int:
        """``cases.model``, in ggml's words."""
        g, context, case, x = self.g, self.context, self.case, self.x
        for i in range(case.layers):
            if case.kind == "step":
                x = g.add(context, x, self._attention(i, g.rms_norm(context, x, 1e-6)))
            normed = g.rms_norm(context, x, 1e-6)
            inner = self._product(normed, f"{i}.{'gate' if case.gated else 'up'}")
            inner = g.add(context, inner, self.rest[f"{i}.bias"])
            if case.gated:
                split = g.reglu_split if case.activation == "relu" else g.swiglu_split
                hidden = split(context, inner, self._product(normed, f"{i}.up"))
            else:
                hidden = g.relu(context, inner)
            x = g.add(context, x, self._product(hidden, f"{i}.down"))
        if case.kind == "ffn":
            return x
        return g.argmax(context, self._product(g.rms_norm(context, x, 1e-6), "head"))

    def _attention(self, i: int, x: int) -> int:
        g, context, width = self.g, self.context, self.case.head_width
        heads = self.case.d // width
        q = g.reshape_3d(context, self._product(x, f"{i}.q"), width, 1, heads)
        k = g.reshape_3d(context, self._product(x, f"{i}.k"), width, 1, heads)
        # Values lie turned, the context first, as in llama.cpp.
        v = g.reshape_3d(context, self._product(x, f"{i}.v"), 1, width, heads)
        scores = g.mul_mat(context, g.concat(context, self.rest[f"{i}.keys"], k, 1), q)
        weights = g.soft_max_ext(context, scores, None, width**-0.5, 0.0)
        mixed = g.mul_mat(context, g.concat(context, self.rest[f"{i}.values"], v, 0), weights)
        return self._product(g.reshape_2d(context, mixed, self.case.d, 1), f"{i}.o")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """One call."""
        g, case = self.g, self.case
        g.wake()
        self._set(self.x, x)
        g.backend_graph_compute(g.backend, self.graph)
        ffn = case.kind == "ffn"
        result = np.empty((case.tokens, case.d) if ffn else (case.tokens,), np.float32 if ffn else np.int32)
        g.backend_tensor_get(self.result, result.ctypes.data, 0, result.nbytes)
        return result


def _quantized(g: Ggml, kind: int, name: str, matrix: np.ndarray) -> np.ndarray:
    rows = rows_out(name, matrix)
    packed = np.empty(rows.size // BLOCK * BLOCK_BYTES[kind], np.uint8)
    g.quantize_chunk(kind, rows.ctypes.data, packed.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
    return packed


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """Two."""
    case = weights.case
    names = {Q8_0: "llama.cpp Q8_0", Q4_0: "llama.cpp Q4_0"}
    if not settings.ggml or not list(pathlib.Path(settings.ggml).glob("libggml-base*.so")):
        yield Left("llama.cpp Q8_0, Q4_0", HELP)
        return
    if settings.ggml not in _libraries:
        _libraries[settings.ggml] = Ggml(settings.ggml, settings.threads)
    g = _libraries[settings.ggml]
    rest = {**weights.biases, **{k: _turned(k, a) for k, a in weights.cache.items()}}
    for kind, name in names.items():
        read = case.elements // BLOCK * BLOCK_BYTES[kind]
        count = sets_for(read, settings.apart)
        reason = settings.short_of(read * (count + 1))
        if reason:
            yield Left(name, reason)
            continue
        data = {key: _quantized(g, kind, key, matrix) for key, matrix in weights.arrays.items()}
        place = g.buffer_type(kind)
        sets = [Model(g, case, kind, place, data, rest) for _ in range(count)]
        del data

        def call(i: int, sets: list[Model] = sets) -> np.ndarray:
            return sets[i % len(sets)](weights.inputs[i % len(weights.inputs)])

        note = "repacked" if place != g.ordinary else ""
        yield Kernel(name, read, read, call, INT8 if kind == Q8_0 else INT4, note=note)


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """Values with their context last."""
    return np.ascontiguousarray(array.swapaxes(1, 2)) if name.endswith("values") else array
