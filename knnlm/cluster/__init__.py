"""Building and serving beyond one machine, on Ray: the optional extra `cluster`. Commands import it when asked."""
