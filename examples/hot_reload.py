"""Swap the model under a conversation that goes on: nothing is lost, whoever waits is served by the new one."""

import sys

from llama_worker import LlamaWorker, Message, ModelConfig


def main(max_tokens: int = 32) -> None:
    with LlamaWorker(ModelConfig(model="demo://smollm2-135m-instruct", n_ctx=1024)) as worker:
        talk = [Message(role="user", content="Name one sea bird.")]
        reply = worker.generate(talk, max_tokens=max_tokens, temperature=0.0)
        print(f"n_ctx {worker.n_ctx}: {reply.text!r}")

        before = worker.stream(talk, max_tokens=max_tokens, temperature=0.0)
        worker.reload(n_ctx=4096, type_k="q8_0", type_v="q8_0", flash_attn="on")  # waits until `before` is finished
        print(f"the stream from before the reload still ends in order: {list(before)[-1]!r}"[:78])

        talk += [Message(role="assistant", content=reply.text), Message(role="user", content="Where does it live?")]
        reply = worker.generate(talk, max_tokens=max_tokens, temperature=0.0)
        print(f"n_ctx {worker.n_ctx}: {reply.text!r}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
