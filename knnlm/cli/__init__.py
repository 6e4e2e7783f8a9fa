"""The `knnlm` command: one file per sub-command."""
