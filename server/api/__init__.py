"""The HTTP side: bodies in, pixels to the engine, answers out. It never imports torch."""
