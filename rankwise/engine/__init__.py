"""The training loop's parts: which rows go together, and the forward pass with its loss."""
