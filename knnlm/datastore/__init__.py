"""The datastore on disk: its format, its writer and reader, and where every entry came from."""
