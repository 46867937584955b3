"""What `python -m launch submit` writes: batch scripts for Slurm, JobSets for Kubernetes."""
