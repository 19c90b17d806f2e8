"""Fine-tuning: a pre-trained encoder with a head becomes a classifier, by MAE's protocol."""
