"""What the search for a schedule asks of a real model and device: its answers for photos, and how long they take."""
