"""langchain-community's ChatLlamaCpp and LlamaCppEmbeddings over llama-cpp-python's `Llama`.

`Llama` is not safe to use from several threads, so the agents take turns through a lock.
`n_batch` is raised from ChatLlamaCpp's default of 8 to 512: with 8 it would be several times slower.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

import llama_cpp.llama_cpp as bindings
from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.embeddings import LlamaCppEmbeddings
from llama_cpp import Llama, LlamaGrammar
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from benchmarks import drive, workload
from benchmarks.contestants.command import main
from benchmarks.drive import Figures, Pieces
from benchmarks.workload import ChatMessage


class Serial:
    """One ChatLlamaCpp behind a lock."""

    def __init__(self, model: str, threads: str, *, n_ctx: int) -> None:
        sampling = {"temperature": 0.0, "repeat_penalty": 1.0}
        sizes = {"n_ctx": n_ctx, "n_batch": 512, "n_threads": int(threads)}
        self._chat = ChatLlamaCpp(model_path=model, verbose=False, **sizes, **sampling)
        _ignore_end_of_generation(self._chat.client)
        self._lock = threading.Lock()

    def complete(self, prompt: str, n_tokens: int) -> Pieces:
        return self.chat([{"role": "user", "content": prompt}], n_tokens)

    def chat(self, messages: Sequence[ChatMessage], n_tokens: int) -> Pieces:
        turns = [(message["role"], message["content"]) for message in messages]
        ended = None
        with self._lock:
            for chunk in self._chat.stream(turns, max_tokens=n_tokens):
                ended = chunk.response_metadata.get("finish_reason", ended)
                yield str(chunk.content)
        return n_tokens if ended == "length" else 0  # no usage while streaming, but only max_tokens ends with "length"


def _ignore_end_of_generation(client: Llama) -> None:
    """`Llama` has no ignore_eos; a logit bias would cost it a copy of the logits per token. This costs nothing."""
    bindings.llama_vocab_is_eog = lambda vocab, token: False
    template = client.metadata["tokenizer.chat_template"]
    formatter = Jinja2ChatFormatter(template=template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    client.chat_handler = formatter.to_chat_handler()


def one_stream(model: str, threads: str) -> Figures:
    return drive.one_stream(Serial(model, threads, n_ctx=workload.ONE_STREAM.n_ctx).complete)


def schema(model: str, threads: str) -> Figures:
    """`Llama` itself: ChatLlamaCpp passes a grammar on and adds nothing."""
    sizes = {"n_ctx": workload.SCHEMA.n_ctx, "n_batch": 512, "n_threads": int(threads)}
    llama = Llama(model, verbose=False, **sizes)
    bindings.llama_vocab_is_eog = lambda vocab, token: False
    grammar = LlamaGrammar.from_json_schema(json.dumps(workload.RECORDS), verbose=False)

    def complete(prompt: str, n_tokens: int, grammar: LlamaGrammar | None = None) -> Pieces:
        sampling = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": n_tokens, "grammar": grammar}
        ended = None
        for chunk in llama.create_completion(prompt, stream=True, **sampling):
            ended = chunk["choices"][0]["finish_reason"] or ended
            yield chunk["choices"][0]["text"]
        return n_tokens if ended == "length" else 0

    return drive.schema(complete, lambda prompt, n_tokens: complete(prompt, n_tokens, grammar))


def eight_streams(model: str, threads: str) -> Figures:
    return drive.eight_streams(Serial(model, threads, n_ctx=workload.EIGHT_STREAMS.n_ctx).complete, serial=True)


def agents(model: str, threads: str, variant: str) -> Figures:
    work = workload.AGENTS[variant]
    return drive.agents(Serial(model, threads, n_ctx=work.n_ctx).chat, work)


def embeddings(model: str, threads: str) -> Figures:
    embedder = LlamaCppEmbeddings(model_path=model, n_batch=512, n_threads=int(threads), verbose=False)
    texts = workload.embed_texts()
    embedder.embed_documents(texts[:8])
    began = time.perf_counter()
    vectors = embedder.embed_documents(texts)
    wall = time.perf_counter() - began
    assert len(vectors) == len(texts)
    return {"texts_s": len(texts) / wall, "fingerprint": drive.fingerprint(vectors)}


if __name__ == "__main__":
    main(
        {
            "one_stream": one_stream,
            "eight_streams": eight_streams,
            "schema": schema,
            "agents": agents,
            "embeddings": embeddings,
        }
    )
