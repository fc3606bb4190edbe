"""Loops of plain ctypes calls over llama.cpp: no text, no streams, no requests.

`agents` is the bound of that line: all agents in step, the system prompt decoded once and shared. `busy` is
what a simple loop loses to another Python thread that computes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import llama_cpp.llama_cpp as llama

from benchmarks import workload
from benchmarks.contestants.busy_thread import BusyThread
from benchmarks.contestants.command import main
from benchmarks.drive import Figures

N_BATCH, N_UBATCH = 2048, 512


class Loop:
    """A context with one batch and a greedy sampler; sequences are numbered from 0."""

    def __init__(self, model: str, threads: str, *, n_ctx: int, n_seq: int) -> None:
        llama.llama_backend_init()
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        self.vocab = llama.llama_model_get_vocab(self._model)
        self._context = llama.llama_init_from_model(self._model, _context_params(int(threads), n_ctx, n_seq))
        self._batch = llama.llama_batch_init(N_BATCH, 0, 1)
        self._greedy = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(self._greedy, llama.llama_sampler_init_greedy())
        self.length = [0] * n_seq
        self._piece = ctypes.create_string_buffer(64)

    def decode(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Append tokens to sequences and return the greedy next token of each."""
        outputs, n = [], 0
        for seq, tokens in rows:
            for token in tokens:
                self._put(n, token, seq)
                n += 1
            self._batch.logits[n - 1] = 1
            outputs.append(n - 1)
        self._batch.n_tokens = n
        status = llama.llama_decode(self._context, self._batch)
        assert status == 0, status
        return [llama.llama_sampler_sample(self._greedy, self._context, row) for row in outputs]

    def prefill(self, seq: int, tokens: Sequence[int]) -> None:
        """Append tokens of which none is to be continued, however many."""
        for start in range(0, len(tokens), N_BATCH):
            self.decode([(seq, tokens[start : start + N_BATCH])])

    def share(self, source: int, target: int) -> None:
        memory = llama.llama_get_memory(self._context)
        llama.llama_memory_seq_cp(memory, source, target, 0, self.length[source])
        self.length[target] = self.length[source]

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        self.length = [0] * len(self.length)

    def tokenize(self, text: str) -> list[int]:
        data, capacity = text.encode(), len(text) + 8
        ids = (ctypes.c_int32 * capacity)()
        return ids[: llama.llama_tokenize(self.vocab, data, len(data), ids, capacity, False, True)]

    def piece(self, token: int) -> bytes:
        return self._piece[: llama.llama_token_to_piece(self.vocab, token, self._piece, 64, 0, True)]

    def _put(self, row: int, token: int, seq: int) -> None:
        batch = self._batch
        batch.token[row], batch.pos[row], batch.logits[row] = token, self.length[seq], 0
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
        self.length[seq] += 1


def _context_params(threads: int, n_ctx: int, n_seq: int) -> llama.llama_context_params:
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_BATCH, N_UBATCH, n_seq
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified, params.n_outputs_max = True, 64
    return params


def agents(model: str, threads: str, variant: str) -> Figures:
    """Nobody waits for anybody: each turn is one prefill of all agents' messages, then joint decoding."""
    work = workload.AGENTS[variant]
    loop = Loop(model, threads, n_ctx=work.n_ctx, n_seq=work.agents)
    loop.decode([(0, loop.tokenize("hello"))])
    loop.clear()
    began = time.perf_counter()
    loop.prefill(0, loop.tokenize(_chatml("system", work.system_message()["content"])))
    for agent in range(1, work.agents):
        loop.share(0, agent)
    asked, ttft, tails = began, 0.0, [""] * work.agents
    last: list[list[int]] = [[] for _ in range(work.agents)]
    for turn in range(work.turns):
        prompts = [last[agent] + loop.tokenize(tails[agent] + _turn(agent, turn)) for agent in range(work.agents)]
        sampled = loop.decode(list(enumerate(prompts)))
        ttft += (time.perf_counter() - asked) / work.turns
        for _ in range(workload.TURN_TOKENS - 1):
            sampled = loop.decode([(seq, [token]) for seq, token in enumerate(sampled)])
        last, tails = [[token] for token in sampled], ["<|im_end|>\n"] * work.agents
        asked = time.perf_counter()
    tokens = work.agents * work.turns * workload.TURN_TOKENS
    return {"wall_s": time.perf_counter() - began, "ttft_s": ttft, "tokens": tokens}


def busy(model: str, threads: str) -> Figures:
    """The same decoding alone, then beside a thread that computes in Python."""
    work = workload.BUSY
    loop = Loop(model, threads, n_ctx=work.n_ctx, n_seq=work.streams)
    prompts = [loop.tokenize(prompt) for prompt in work.prompts()]
    _rate(loop, prompts)
    idle = _rate(loop, prompts)
    with BusyThread():
        beside = _rate(loop, prompts)
    return {"idle_tok_s": idle, "busy_tok_s": beside, "kept": beside / idle}


def _rate(loop: Loop, prompts: Sequence[Sequence[int]]) -> float:
    loop.clear()
    began = time.perf_counter()
    sampled = loop.decode(list(enumerate(prompts)))
    for _ in range(workload.BUSY.n_decodes):
        sampled = loop.decode([(seq, [token]) for seq, token in enumerate(sampled)])
        for token in sampled:
            loop.piece(token)
    return workload.BUSY.streams * workload.BUSY.n_decodes / (time.perf_counter() - began)


def _chatml(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _turn(agent: int, turn: int) -> str:
    return _chatml("user", workload.user_message(agent, turn)["content"]) + "<|im_start|>assistant\n"


if __name__ == "__main__":
    main({"agents": agents, "busy": busy})
