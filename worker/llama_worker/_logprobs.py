"""Log-probabilities of one sampled token and of the likeliest alternatives, by numpy, when asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_worker._engine.base import Floats
from llama_worker._events import TokenLogprob


def logprob_of(logits: Floats, token: int, n_top: int, pieces: Sequence[bytes]) -> TokenLogprob:
    """Softmax of the model's own `logits`, before any sampler: log p(i) = x(i) - max - log sum exp(x - max)."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak, dtype=np.float64).sum()))
    n = min(n_top, len(logits))
    likeliest = np.argpartition(logits, -n)[-n:] if n else np.empty(0, np.int64)
    ordered = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return TokenLogprob(
        token=token,
        text=_text(pieces[token]),
        logprob=float(logits[token]) - total,
        top=tuple((int(i), _text(pieces[i]), float(logits[i]) - total) for i in ordered),
    )


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
