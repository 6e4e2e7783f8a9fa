"""Clients of the services: the Protocols of knnlm/messages.py over gRPC (rpc.py) and over HTTP (http.py)."""
