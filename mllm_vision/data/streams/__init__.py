"""Streamed data sets with exact resume: shards, order, loader."""
