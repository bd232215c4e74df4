"""`tome-server bench` in parts: an HTTP client, loads, what they amount to, and the search for the highest rate."""
