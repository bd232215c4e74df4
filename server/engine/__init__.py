"""The device side: queues, the model runner, its process, and the socket to it."""
