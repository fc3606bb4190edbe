"""Tiny models with random weights, written as GGUF in well under a second.

They mean nothing, but everything about them works: a tokenizer with bytes, words and control tokens, a
ChatML template, an end token, and greedy output that varies. The seed is fixed, so they never change.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

N_VOCAB: Final = 512
N_CTX: Final = 4096
TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNK, BOS, EOS, IM_START, IM_END = range(5)
N_CONTROL: Final = 5
_SPACE: Final = "\u2581"
_TYPES: Final[Mapping[str, Any]] = {
    "f32": None,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_TEXT: Final = (
    "the of and to in a is that it was for on are with as be this user assistant system hello world count lamp stone "
    "river agent tool model token one two three from have not you they all when people water light night small great"
    " house friend garden yellow number"
)
_WORDS: Final = _TEXT.split()


class _Writer:
    """A GGUF file in the making: random matrices of one weight type, norms of ones."""

    def __init__(self, path: Path, architecture: str, weights: str, seed: int, n_vocab: int = N_VOCAB) -> None:
        self.gguf = gguf.GGUFWriter(path, architecture)
        self._random = np.random.default_rng(seed)
        self._type = _TYPES[weights]
        self._n_vocab = n_vocab

    def matrix(self, name: str, *shape: int) -> None:
        """Standard normal, scaled so that a product keeps the size of its input."""
        self._add(name, (self._random.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))

    def _add(self, name: str, data: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        if self._type is None:
            self.gguf.add_tensor(name, data)
        else:
            self.gguf.add_tensor(name, gguf.quants.quantize(data, self._type), raw_dtype=self._type)

    def tokens(self, name: str, n_embd: int) -> None:
        """Embeddings or output rows; control tokens have short ones, so that they are seldom the best."""
        rows = self._random.standard_normal((self._n_vocab, n_embd)) * n_embd**-0.5
        rows[:N_CONTROL] *= 0.5
        self._add(name, rows.astype(np.float32))

    def floats(self, name: str, *shape: int, scale: float = 1.0) -> None:
        """Standard normal times `scale`, always F32: for biases, convolutions and state matrices."""
        self.gguf.add_tensor(name, (self._random.standard_normal(shape) * scale).astype(np.float32))

    def negative(self, name: str, *shape: int) -> None:
        self.gguf.add_tensor(name, -np.abs(self._random.standard_normal(shape)).astype(np.float32))

    def ones(self, name: str, n: int, *, times: float = 1.0) -> None:
        self.gguf.add_tensor(name, np.full(n, times, np.float32))

    def zeros(self, name: str, n: int) -> None:
        self.gguf.add_tensor(name, np.zeros(n, np.float32))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


class _Tiles(_Writer):
    """Draws few numbers and repeats them."""

    def matrix(self, name: str, *shape: int) -> None:
        tile = self._random.standard_normal(100_003) * shape[-1] ** -0.5
        self.gguf.add_tensor(name, np.resize(tile.astype(np.float16), shape))


def llama(
    path: Path,
    *,
    weights: str = "f32",
    n_layer: int = 3,
    seed: int = 0,
    space_prefix: bool = False,
    n_vocab: int = N_VOCAB,
    template: str = TEMPLATE,
    width: int = 1,
    n_ctx: int = N_CTX,
) -> Path:
    """Plain attention: `width` times 128 wide, 4 heads, 2 KV heads."""
    out, n_embd = _Writer(path, "llama", weights, seed, n_vocab), 128 * width
    heads = {"n_head": 4 * width, "n_head_kv": 2 * width}
    _attention_shape(out.gguf, n_embd=n_embd, n_ff=2 * n_embd, n_layer=n_layer, n_vocab=n_vocab, n_ctx=n_ctx, **heads)
    _sentencepiece(out.gguf, space_prefix=space_prefix, n_vocab=n_vocab, template=template)
    _ends(out, n_embd)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        _attention(out, name, n_embd=n_embd, **heads)
        _feed_forward(out, name, n_embd=n_embd, n_ff=2 * n_embd)
    out.close()
    return path


def large_llama(path: Path, *, n_layer: int = 8, n_vocab: int = 200_000) -> Path:
    """A model that takes seconds to load, F16: 2048 wide, 120 MB a layer, with the vocabulary of a large one.

    Its weights repeat, for they are there to be loaded.
    """
    out = _Tiles(path, "llama", "f16", seed=0, n_vocab=n_vocab)
    _attention_shape(out.gguf, n_embd=2048, n_ff=8192, n_layer=n_layer, n_head=16, n_head_kv=4, n_vocab=n_vocab)
    _sentencepiece(out.gguf, n_vocab=n_vocab)
    out.matrix("token_embd.weight", n_vocab, 2048)  # and, without one of its own, the output matrix
    out.ones("output_norm.weight", 2048)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        _attention(out, name, n_embd=2048, n_head=16, n_head_kv=4)
        _feed_forward(out, name, n_embd=2048, n_ff=8192)
    out.close()
    return path


def swa(path: Path, *, window: int = 64, seed: int = 0, weights: str = "f32", n_layer: int = 4, width: int = 1) -> Path:
    """gemma2: every other layer sees a sliding window of 64 tokens."""
    out, n_embd = _Writer(path, "gemma2", weights, seed), 128 * width
    heads = {"n_head": 4 * width, "n_head_kv": 2 * width}
    _attention_shape(out.gguf, n_embd=n_embd, n_ff=2 * n_embd, n_layer=n_layer, **heads)
    out.gguf.add_key_length(32)
    out.gguf.add_value_length(32)
    out.gguf.add_sliding_window(window)
    out.gguf.add_attn_logit_softcapping(50.0)
    out.gguf.add_final_logit_softcapping(30.0)
    _sentencepiece(out.gguf)
    out.tokens("token_embd.weight", n_embd)
    out.ones("output_norm.weight", n_embd)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        _attention(out, name, n_embd=n_embd, **heads)
        _feed_forward(out, name, n_embd=n_embd, n_ff=2 * n_embd)
        # The output matrix is the embedding: unless the layers outweigh it, each token predicts itself.
        out.ones(name + "post_attention_norm.weight", n_embd, times=10.0)
        out.ones(name + "post_ffw_norm.weight", n_embd, times=10.0)
    out.close()
    return path


def mamba(path: Path, *, seed: int = 0, weights: str = "f32", n_layer: int = 2, width: int = 1) -> Path:
    """Recurrent: layers of a state-space model, no attention."""
    n_embd, inner, state, rank, kernel = 64 * width, 128 * width, 16, 8 * width, 4
    out = _Writer(path, "mamba", weights, seed)
    _shape(out.gguf, n_embd=n_embd, n_ff=0, n_layer=n_layer, n_head=0)
    out.gguf.add_ssm_conv_kernel(kernel)
    out.gguf.add_ssm_inner_size(inner)
    out.gguf.add_ssm_state_size(state)
    out.gguf.add_ssm_time_step_rank(rank)
    _sentencepiece(out.gguf)
    _ends(out, n_embd)
    for layer in range(n_layer):
        name = f"blk.{layer}."
        out.ones(name + "attn_norm.weight", n_embd)
        out.matrix(name + "ssm_in.weight", 2 * inner, n_embd)
        out.floats(name + "ssm_conv1d.weight", inner, kernel, scale=0.5)
        out.floats(name + "ssm_conv1d.bias", inner, scale=0.05)
        out.matrix(name + "ssm_x.weight", rank + 2 * state, inner)
        out.floats(name + "ssm_dt.weight", inner, rank, scale=0.3)
        out.floats(name + "ssm_dt.bias", inner, scale=0.05)
        out.negative(name + "ssm_a", inner, state)
        out.ones(name + "ssm_d", inner)
        out.matrix(name + "ssm_out.weight", n_embd, inner)
    out.close()
    return path


def lfm2(path: Path, *, seed: int = 0, weights: str = "f32", n_layer: int = 4, width: int = 1, head: int = 16) -> Path:
    """Hybrid: short convolutions and attention, layer about; heads of `head` numbers."""
    n_embd, n_ff, n_head, kernel = 64 * width, 128 * width, 64 * width // head, 3
    kv_heads = [0, n_head // 2] * (n_layer // 2)
    out = _Writer(path, "lfm2", weights, seed)
    _shape(out.gguf, n_embd=n_embd, n_ff=n_ff, n_layer=len(kv_heads), n_head=n_head)
    out.gguf.add_head_count_kv(kv_heads)
    out.gguf.add_rope_freq_base(10000.0)
    out.gguf.add_uint32("lfm2.shortconv.l_cache", kernel)
    _sentencepiece(out.gguf)
    out.tokens("token_embd.weight", n_embd)
    out.ones("token_embd_norm.weight", n_embd)
    for layer, heads in enumerate(kv_heads):
        name = f"blk.{layer}."
        _feed_forward(out, name, n_embd=n_embd, n_ff=n_ff)
        if heads:
            _attention(out, name, n_embd=n_embd, n_head=n_head, n_head_kv=heads)
            out.ones(name + "attn_q_norm.weight", n_embd // n_head)
            out.ones(name + "attn_k_norm.weight", n_embd // n_head)
        else:
            out.ones(name + "attn_norm.weight", n_embd)
            out.floats(name + "shortconv.conv.weight", n_embd, kernel, scale=0.6)
            out.matrix(name + "shortconv.in_proj.weight", 3 * n_embd, n_embd)
            out.matrix(name + "shortconv.out_proj.weight", n_embd, n_embd)
    out.close()
    return path


def bert(path: Path, *, seed: int = 0) -> Path:
    """An embedding model: two bidirectional layers, mean pooling, texts of at most 512 tokens."""
    n_embd, n_ff = 64, 128
    out = _Writer(path, "bert", "f32", seed)
    _shape(out.gguf, n_embd=n_embd, n_ff=n_ff, n_layer=2, n_head=4, n_ctx=512)
    out.gguf.add_layer_norm_eps(1e-12)
    out.gguf.add_causal_attention(False)
    out.gguf.add_pooling_type(gguf.PoolingType.MEAN)
    _wordpiece(out.gguf)
    out.tokens("token_embd.weight", n_embd)
    out.floats("position_embd.weight", 512, n_embd, scale=0.1)
    out.floats("token_types.weight", 2, n_embd, scale=0.1)
    _norm(out, "token_embd_norm", n_embd)
    for layer in range(2):
        name = f"blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            out.matrix(f"{name}{part}.weight", n_embd, n_embd)
            out.zeros(f"{name}{part}.bias", n_embd)
        out.matrix(name + "ffn_up.weight", n_ff, n_embd)
        out.zeros(name + "ffn_up.bias", n_ff)
        out.matrix(name + "ffn_down.weight", n_embd, n_ff)
        out.zeros(name + "ffn_down.bias", n_embd)
        _norm(out, name + "attn_output_norm", n_embd)
        _norm(out, name + "layer_output_norm", n_embd)
    out.close()
    return path


MODELS: Final[Mapping[str, Callable[[Path], Path]]] = {
    "llama": llama,
    "llama_q8": lambda path: llama(path, weights="q8_0"),
    "swa": swa,
    "mamba": mamba,
    "lfm2": lfm2,
    "bert": bert,
}


# --- parts


def _shape(
    w: Any, *, n_embd: int, n_ff: int, n_layer: int, n_head: int, n_ctx: int = N_CTX, n_vocab: int = N_VOCAB
) -> None:
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_feed_forward_length(n_ff)
    w.add_block_count(n_layer)
    w.add_head_count(n_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(n_vocab)


def _attention_shape(
    w: Any,
    *,
    n_embd: int,
    n_ff: int,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    n_ctx: int = N_CTX,
    n_vocab: int = N_VOCAB,
) -> None:
    _shape(w, n_embd=n_embd, n_ff=n_ff, n_layer=n_layer, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab)
    w.add_head_count_kv(n_head_kv)
    w.add_rope_dimension_count(n_embd // n_head)
    w.add_rope_freq_base(10000.0)


def _ends(out: _Writer, n_embd: int) -> None:
    out.tokens("token_embd.weight", n_embd)
    out.ones("output_norm.weight", n_embd)
    out.tokens("output.weight", n_embd)


def _norm(out: _Writer, name: str, n_embd: int) -> None:
    out.ones(name + ".weight", n_embd)
    out.zeros(name + ".bias", n_embd)


def _attention(out: _Writer, name: str, *, n_embd: int, n_head: int, n_head_kv: int) -> None:
    width = n_embd // n_head
    out.ones(name + "attn_norm.weight", n_embd)
    out.matrix(name + "attn_q.weight", n_embd, n_embd)
    out.matrix(name + "attn_k.weight", n_head_kv * width, n_embd)
    out.matrix(name + "attn_v.weight", n_head_kv * width, n_embd)
    out.matrix(name + "attn_output.weight", n_embd, n_embd)


def _feed_forward(out: _Writer, name: str, *, n_embd: int, n_ff: int) -> None:
    out.ones(name + "ffn_norm.weight", n_embd)
    out.matrix(name + "ffn_gate.weight", n_ff, n_embd)
    out.matrix(name + "ffn_up.weight", n_ff, n_embd)
    out.matrix(name + "ffn_down.weight", n_embd, n_ff)


# --- tokenizers


def _sentencepiece(w: Any, *, space_prefix: bool = False, n_vocab: int = N_VOCAB, template: str = TEMPLATE) -> None:
    kind = gguf.TokenType
    pieces = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    pieces += [("<|im_start|>", 0.0, kind.CONTROL), ("<|im_end|>", 0.0, kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    pieces += [(text, -float(rank), kind.NORMAL) for rank, text in enumerate(_words(n_vocab - len(pieces)))]
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([text for text, _, _ in pieces])
    w.add_token_scores([score for _, score, _ in pieces])
    w.add_token_types([kind for _, _, kind in pieces])
    w.add_unk_token_id(UNK)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(IM_END)
    w.add_eot_token_id(IM_END)
    w.add_add_bos_token(True)
    w.add_add_space_prefix(space_prefix)
    w.add_chat_template(template)


def _words(n: int) -> list[str]:
    """Exactly `n` pieces, best first: letters are merged to words through the words' own prefixes."""
    letters = [_SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    prefixes = dict.fromkeys(_SPACE + word[:end] for word in _WORDS for end in range(1, len(word) + 1))
    fillers = (f"{_SPACE}{number:x}" for number in range(n))
    return [*list(dict.fromkeys([*prefixes, *fillers]))[: n - len(letters)], *letters]


def _wordpiece(w: Any) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    starts = (_SPACE + text for text in [*_WORDS, *letters, *string.punctuation])
    tokens = list(dict.fromkeys([*special, *starts, *letters]))
    tokens += [f"[unused{i}]" for i in range(N_VOCAB - len(tokens))]
    kind = gguf.TokenType
    w.add_token_type_count(2)
    w.add_tokenizer_model("bert")
    w.add_tokenizer_pre("bert-bge")
    w.add_token_list(tokens)
    w.add_token_types([kind.CONTROL if token in special else kind.NORMAL for token in tokens])
    w.add_bos_token_id(2)
    w.add_eos_token_id(3)
    w.add_sep_token_id(3)
    w.add_pad_token_id(0)
    w.add_unk_token_id(1)
    w.add_mask_token_id(4)


def dequantized(source: Path, target: Path) -> Path:
    """The model `source` with all weights as F32, written to `target`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
