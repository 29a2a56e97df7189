"""SGLang: the HiCache storage backend. `hicache.py` holds the class that SGLang's dynamic backend loads."""
