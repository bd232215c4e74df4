"""The HTTP side: reads requests, sends images to the engine, and writes answers. It never imports torch.

`app.py` builds the application; `process.py` is an HTTP process. A request is parsed by the rules of HTTP
(`framing.py`), under limits that apply while its body arrives (`middleware.py`, `connection.py`). It is checked against
the model (`terms.py`) and admitted or refused before any pixel is decoded (`admission.py`). It is awaited until its
deadline, or until its client leaves (`patience.py`).

The page consists of static files (`page.py`). It uses only the public endpoints, and its content security policy allows
only its own origin.
"""
