"""Pictures of what a model reconstructs and attends to."""
