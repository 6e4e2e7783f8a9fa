"""Clients of the services: knnlm/protocols.py over gRPC (rpc.py) and over HTTP (http.py)."""
