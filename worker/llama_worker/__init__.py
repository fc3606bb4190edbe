from llama_worker._version import __version__ as __version__
