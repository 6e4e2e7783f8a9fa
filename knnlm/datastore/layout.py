"""What the files of a datastore are called; what each holds is said where it is read and written."""

MANIFEST = "manifest.json"
KEYS = "keys.npy"  # (n, d) float16 or float32
VALUES = "values.npy"  # (n,) int32
TOKENS = "tokens.npy"  # (t,) int32
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"  # of the tokenizers library: text can be shown without the model
CURRENT = "CURRENT"  # one level up: the name of the version that answers
