"""Text to token ids and back, one way everywhere: in process, in the lm service and in the aggregator.

A document is encoded whole, without the tokenizer's own special-token template, and the BOS token is put before it once
when the model has one. Tokenizing line by line, or letting the template decide, puts BOS tokens into datastores.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import tokenizers

from knnlm.errors import ModelError

__all__ = ["Tokenizer"]


class Tokenizer:
    """`json` is the serialisation of the tokenizers library. Raises ModelError when it is none."""

    def __init__(self, json: str, *, bos_token_id: int | None, eos_token_id: int | None) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_str(json)
        except Exception as err:  # the library raises bare Exception for every malformed file
            raise ModelError(f"not a tokenizer of the tokenizers library: {err}") from err
        self._backend.no_truncation()
        self._backend.no_padding()
        self.json = json
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """(t,) int32: BOS first when there is one, then the text, where special tokens are plain text's own."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return np.array(start + ids, np.int32)

    def decode(self, ids: npt.NDArray[np.integer] | list[int]) -> str:
        """The text of several tokens, special tokens included; ids the tokenizer does not know give nothing."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token by itself. Bytes that are no character alone show as U+FFFD."""
        return self.decode([token_id])

    def __len__(self) -> int:
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size
