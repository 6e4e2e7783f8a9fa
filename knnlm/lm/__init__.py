"""The language model: architectures, keys, the forward pass, and training a small one. The only home of torch."""
