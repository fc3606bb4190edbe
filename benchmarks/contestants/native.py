"""llama.cpp's own benchmarks: no sampling, no text, no clients. The bound of what its kernels give."""

from __future__ import annotations

import json
import subprocess

from benchmarks import places, workload
from benchmarks.contestants.command import main
from benchmarks.drive import Figures


def one_stream(model: str, threads: str) -> Figures:
    work = workload.ONE_STREAM
    sizes = ["-p", "0", "-n", str(work.n_decodes), "-d", str(work.prompt_tokens)]
    (result,) = _run("llama-bench", "-m", model, "-t", threads, *sizes, "-r", "1", "-o", "jsonl")
    assert result["n_gen"] == work.n_decodes, result["n_gen"]
    return {"tok_s": result["avg_ts"], "tokens": result["n_gen"]}


def eight_streams(model: str, threads: str, *layout: str) -> Figures:
    """`layout` "-kvu": all sequences in one unified cache, as llama-worker needs it to share prefixes."""
    work = workload.EIGHT_STREAMS
    sizes = ["-npp", str(work.prompt_tokens), "-ntg", str(work.n_decodes), "-npl", str(work.streams)]
    common = ["-m", model, "-t", threads, "-tb", threads, "-c", str(work.n_ctx), "--output-format", "jsonl"]
    (result,) = _run("llama-batched-bench", *common, *sizes, *layout)
    tokens = result["pl"] * result["tg"]
    assert tokens == work.streams * work.n_decodes, tokens
    wall = result["t_pp"] + result["t_tg"]
    return {"tok_s": tokens / wall, "wall_s": wall, "decode_tok_s": result["speed_tg"], "tokens": tokens}


def _run(tool: str, *arguments: str) -> list[dict[str, float]]:
    command = [str(places.tool(tool)), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main({"one_stream": one_stream, "eight_streams": eight_streams})
