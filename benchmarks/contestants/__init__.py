"""The scripts that do a line's work once, in a fresh process, and print one JSON object of figures last.

Each runs as `python -m benchmarks.contestants.NAME LINE MODEL [OPTION …]` from the repository root.
"""
