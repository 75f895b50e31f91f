"""Leaderboards: boards and records (data), and the code that renders tables from them. Needs no torch."""
