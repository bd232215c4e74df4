"""The parts of `tome-server bench`: an HTTP client, loads, their results, and the search for the highest rate."""
