"""Other servers with the same model, each a program of its own: what benchmarks.serving measures ours beside.

Each is written from its documentation, with the settings that this recommends for dynamic batching. They are set up by
variables (`model.py`), as some of them start processes and read command lines themselves. They are no dependencies:
pip install litserve bentoml 'ray[serve]' mosec. Tried on 2026-11-22: LitServe 0.2.19, BentoML 1.4.39, Ray 2.60.0,
Mosec 0.9.8.
"""
