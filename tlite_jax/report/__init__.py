"""One self-contained HTML page per run: what it learned, forgot, read, and where its hours went."""
