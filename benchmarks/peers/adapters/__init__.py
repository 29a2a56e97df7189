"""One module a peer: how its server is started, and its client, which imports the peer's own library."""
