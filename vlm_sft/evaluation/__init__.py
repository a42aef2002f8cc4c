"""Answers to held-out rows, their scores, and pages to look at."""
