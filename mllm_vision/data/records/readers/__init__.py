"""Readers of one format each: files, folders, CSV, JSON, Parquet, Arrow, tars, the Hub."""
