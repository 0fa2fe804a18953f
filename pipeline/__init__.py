"""Rows of one shard to answers, in one process on one device. Knows no run folder."""
