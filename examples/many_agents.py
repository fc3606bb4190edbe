"""Many agents at once on one worker: they are decoded together and share the KV of their system prompt."""

import asyncio
import sys

from llama_worker import LlamaWorker, ModelConfig, Reply

SYSTEM = "You work at a harbour office. You are brief, polite and exact, and you answer in one sentence. " * 8
QUESTIONS = [
    "What is a tide?",
    "What is a buoy?",
    "What is an anchor?",
    "What is a pilot?",
    "What is a knot?",
    "What is fog?",
]


async def ask(worker: LlamaWorker, question: str, max_tokens: int) -> Reply:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return await worker.agenerate(messages, max_tokens=max_tokens, temperature=0.0)


async def main(max_tokens: int = 32) -> None:
    with LlamaWorker(ModelConfig(model="demo://smollm2-135m-instruct", n_parallel=4)) as worker:
        replies = await asyncio.gather(*(ask(worker, question, max_tokens) for question in QUESTIONS))
    for question, reply in zip(QUESTIONS, replies, strict=True):
        usage = reply.usage
        print(f"{question} {reply.text!r}")
        print(f"    {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused, {usage.completion_tokens} new")


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
