"""What can be trained: pre-training and classification."""
