"""What crosses between processes, and both ends of the socket. It knows neither HTTP nor torch."""
