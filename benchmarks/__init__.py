"""One program per figure; what each measures, its goal and what came out: README.md. All at once: `make bench`."""
