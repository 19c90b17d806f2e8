"""Loading the weights of runs and files."""
