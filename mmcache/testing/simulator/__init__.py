"""Whole clusters, simulated from a seed: the code that decides is the real one, clock, network and memory are made up.

What is simulated is what runs: placement, routes, searches and calls (client/cluster_steps.py), breakers, the index
with its extents, leases, policies and restarts. Made up are here the clock and the network (world.py), the shell round
an index (node.py), the shell round a client's calls (client.py), traffic (traffic.py) and faults (faults.py). No
threads, no sockets, no time passes, and everything follows from the seed. See docs/simulator.md.
"""
