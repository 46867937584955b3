"""Metrics sent to experiment trackers from processes of their own, which nothing waits for but the end, for a while."""
