"""Other servers with the same model, each a separate program, for comparison in benchmarks.serving.

Each follows its own documentation, with the settings recommended there for dynamic batching. Variables configure them
(`model.py`), because some of them start processes and parse command lines themselves. They are not dependencies: pip
install litserve bentoml 'ray[serve]' mosec. Tried on 2026-11-22: LitServe 0.2.19, BentoML 1.4.39, Ray 2.60.0, Mosec
0.9.8.
"""
