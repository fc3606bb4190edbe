"""Getting the peers: llama.cpp's tools from the very source of the installed llama-cpp-python, and virtual
environments. Everything is kept in benchmarks/.work; what is there already is not made again.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import places

TOOLS = ("llama-bench", "llama-batched-bench", "llama-server")
# As llama-cpp-python builds its wheel (Release, shared, ggml's defaults), without what only needs time or a network.
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
PEERS = {
    "langchain": ("llama-cpp-python=={version}", "langchain-community>=0.4,<0.5"),
    "xllamacpp": ("xllamacpp",),
}
JOBS = "2"

Say = Callable[[str], None]


def build_all(say: Say) -> None:
    """Fetch, unpack, compile and install what is missing. Takes about ten minutes the first time."""
    version = importlib.metadata.version("llama-cpp-python")
    places.WORK.mkdir(parents=True, exist_ok=True)
    if not all(places.tool(name).exists() for name in TOOLS):
        _unpack(version, say)
        _compile(version, say)
    for peer, requirements in PEERS.items():
        _install(peer, [requirement.format(version=version) for requirement in requirements], say)


def peer_versions() -> dict[str, str]:
    """What the peers' environments hold, for the report."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    names = {"langchain": "langchain-community", "xllamacpp": "xllamacpp"}
    found = {name: _output(str(places.peer_python(peer)), "-c", code, name) for peer, name in names.items()}
    return {"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), **found}


def _unpack(version: str, say: Say) -> None:
    if places.sources(version).exists():
        return
    say(f"fetching the source of llama-cpp-python {version}")
    package = f"llama-cpp-python=={version}"
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", package, "-d", str(places.WORK))
    (archive,) = places.WORK.glob(f"llama_cpp_python-{version}.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(places.WORK, filter="data")


def _compile(version: str, say: Say) -> None:
    say("compiling llama.cpp's tools")
    source, target = places.sources(version) / "vendor" / "llama.cpp", places.WORK / "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", "-S", str(source), "-B", str(target), *generator, *FLAGS)
    _run("cmake", "--build", str(target), "-j", JOBS, "--target", *TOOLS)


def _install(peer: str, requirements: list[str], say: Say) -> None:
    """The marker is written last, so that an environment that was interrupted is made again."""
    home = places.peer_python(peer).parent.parent
    marker = home / "installed.txt"
    if marker.exists() and marker.read_text() == "\n".join(requirements):
        return
    say(f"installing {', '.join(requirements)}")
    _run(sys.executable, "-m", "venv", "--clear", str(home))
    _run(str(places.peer_python(peer)), "-m", "pip", "install", *requirements)
    marker.write_text("\n".join(requirements))


def _run(*command: str) -> None:
    log = places.WORK / "build.log"
    with log.open("a") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {Path(command[0]).name} {' '.join(command[1:4])} … (see {log})\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
