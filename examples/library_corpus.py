"""The text that the bundled model is trained on: the running interpreter's own library, split by file and tokenized."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_FILE = "<|endoftext|>"

# Tests, and files that are tables or generated data rather than code someone wrote.
EXCLUDED_FOLDERS = {
    "__pycache__",
    "encodings",
    "idle_test",
    "lib2to3",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
EXCLUDED_FILES = {"html/entities.py", "stringprep.py"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


def library_files(root: Path) -> list[Path]:
    """Returns the Python files under root that are code, relative to it, in a fixed order."""
    if not root.is_dir():
        raise FileNotFoundError(f"--source: no folder at {root}")
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or relative.as_posix() in EXCLUDED_FILES:
            continue
        if relative.parts[0].startswith(EXCLUDED_PREFIXES):
            continue
        files.append(relative)
    if not files:
        raise FileNotFoundError(f"--source: no Python files under {root}")
    return files


def is_held_out(relative: Path, percent: float) -> bool:
    """Decides by a hash of the path alone, so that a file stays on its side whatever else changes."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields only {tokenizer.get_vocab_size()} tokens, fewer than {vocab_size}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the texts as one row of tokens, each text opened by the end-of-file token of the one before it."""
    end = tokenizer.token_to_id(END_OF_FILE)
    rows = [np.array([end, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(rows)


@dataclass(frozen=True)
class Corpus:
    """The tokenizer, and the two sides of the split as rows of tokens."""

    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray
    prompt: str
    files: int
    heldout_files: int


def pick_prompt(texts: list[str], lines: int = 12) -> str:
    """Returns the first lines of a function in the middle of the longest text."""
    body = max(texts, key=len).splitlines()
    starts = [i for i, line in enumerate(body) if line.lstrip().startswith("def ")]
    start = min(starts, key=lambda i: abs(i - len(body) // 2), default=0)
    return "\n".join(body[start : start + lines]) + "\n"


def read_corpus(
    source: Path, tokenizer_path: Path, *, vocab_size: int, length: int, heldout_percent: float, seed: int
) -> Corpus:
    """Reads and tokenizes the library; the tokenizer is trained, and saved, unless there is one already.

    Args:
      source: folder of the library.
      tokenizer_path: file of the tokenizer.
      vocab_size: tokens of a new one.
      length: tokens of a window; each side has to hold two.
      heldout_percent: share of the files that are held out.
      seed: of the order of those.
    """
    files = library_files(source)
    sides: tuple[list[str], list[str]] = ([], [])
    for relative in files:
        text = (source / relative).read_text(encoding="utf-8", errors="replace")
        sides[is_held_out(relative, heldout_percent)].append(text)
    train_texts, heldout_texts = sides
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(train_texts, vocab_size)
        tokenizer.save(str(tokenizer_path))
    # The files are shuffled so that the leading part of the held-out tokens is a fair sample of them.
    order = np.random.default_rng(seed).permutation(len(heldout_texts))
    corpus = Corpus(
        tokenizer=tokenizer,
        train=encode(tokenizer, train_texts),
        heldout=encode(tokenizer, [heldout_texts[i] for i in order]) if heldout_texts else np.zeros(0, np.uint16),
        prompt=pick_prompt(heldout_texts) if heldout_texts else "",
        files=len(files),
        heldout_files=len(heldout_texts),
    )
    for name, tokens in (("training", corpus.train), ("held-out", corpus.heldout)):
        if len(tokens) < 2 * length + 1:
            raise ValueError(f"only {len(tokens)} {name} tokens, fewer than two windows of --length {length}")
    return corpus
