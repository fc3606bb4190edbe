"""The same work for llama-worker and its peers, side by side: `python -m benchmarks --rounds quick`.

A *line* is one row of the table: some work, the contestants that do it, and the claims about their
ratios. A *contestant* is a script that does that work once in a fresh process and prints its figures.
`workload` holds the texts and sizes, `drive` the clock: both are the same for every contestant.
"""
