"""MERA 1.1.0: the Russian benchmark as it was run in July 2024 (see docs/mera.md)."""
