"""The client: one conversation without I/O, decided in pure code, and thin drivers that move the bytes."""
