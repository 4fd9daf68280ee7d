"""Ours against the peers: `python -m jobs.bench MODE`."""
