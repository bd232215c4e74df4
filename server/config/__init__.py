"""The live configuration: each model's deployment `r`, versioned, and where it is kept."""
