"""Memory Decoder (Cao et al. 2025, arXiv 2508.09874): targets of a datastore, memories trained on them."""
