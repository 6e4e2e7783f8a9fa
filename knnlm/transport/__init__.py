"""What clients and services share below their messages: TLS, keys, and what travels with every call."""
