"""Equal to transformers, with proof: what `bitnet-edu verify` does."""
