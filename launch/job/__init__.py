"""The place of this process in its job: who the others are, and what becomes of it when one of them is lost or slow."""
