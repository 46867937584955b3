"""What `recipe` is made of: running a command, showing the graph."""
