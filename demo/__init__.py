"""`make demo`: the whole system on real text that every machine with this project installed has."""
