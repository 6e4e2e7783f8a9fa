"""Search over the keys of a datastore: FAISS, and nothing of FAISS beyond this package."""
