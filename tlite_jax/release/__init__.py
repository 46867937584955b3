"""What is checked of a release before it is called one."""
