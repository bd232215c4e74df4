"""Queues, batches and the choice of `r`. Pure: it knows neither HTTP nor torch, and its clock is an argument."""
