"""Bytes: sources on disk -> shards -> augmented fixed-shape batches."""
