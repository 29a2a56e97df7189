"""How bytes move between a client and a shard: framed sockets and shared memory, behind one small set of ideas."""
