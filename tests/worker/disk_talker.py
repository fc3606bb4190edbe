"""A process with a fake worker that holds many conversations over one slot, so that it writes to its folder all the
time, until it is killed. It prints a line for each reply: how many files there are.
"""

from __future__ import annotations

import sys
from itertools import count

from llama_worker import LlamaWorker
from llama_worker.testing import fake_loader, fake_worker


def prompt(i: int) -> str:
    return f"{i} " + "a prompt that is long enough " * (20 + i)


def talk(worker: LlamaWorker, text: str) -> str:
    return worker.generate(text, max_tokens=8, ignore_eos=True).text


def main(kind: str, folder: str) -> None:
    with fake_worker(
        loader=fake_loader(hybrid=kind == "hybrid"), n_parallel=1, cache_ram=0, cache_dir=folder
    ) as worker:
        for i in count():
            talk(worker, prompt(i % 6))
            print(worker.cache_metrics().disk, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
