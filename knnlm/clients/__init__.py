"""Clients of the services: knnlm/protocols.py over gRPC (rpc.py) and HTTP (http.py); the aggregator (aggregator.py)."""
