"""What `quickstart` starts from: a corpus, a base model, a tokenizer for a model without one."""
