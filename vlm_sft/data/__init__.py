"""Rows from anywhere, each checked once before training."""
