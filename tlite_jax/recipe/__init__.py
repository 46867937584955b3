"""Recipes: a graph of commands, each run when what it reads has changed, or what it made is gone or harmed."""
