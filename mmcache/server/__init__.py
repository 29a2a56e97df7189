"""The shard server: what each message means, one thread per connection, and the process around them."""
