"""The two-tier cache: configuration, storage, policies. Knows tensors; knows nothing about transformers or models."""
