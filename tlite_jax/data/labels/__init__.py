"""What gives documents labels: language identification, trained classifiers, columns of others, the user's own code."""
