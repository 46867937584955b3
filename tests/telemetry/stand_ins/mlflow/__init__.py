"""What is used of MLflow's client: everything is one JSON file, at the tracking address."""
