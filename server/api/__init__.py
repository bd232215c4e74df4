"""The HTTP side: bodies in, images to the engine, answers out. It never imports torch.

`app.py` wires; `process.py` is an HTTP process. A request is read by the rules of HTTP (`framing.py`), under limits
that hold while its body arrives (`middleware.py`, `connection.py`). It is checked against the model (`terms.py`),
admitted or refused before any pixel is decoded (`admission.py`), and waited for until its deadline, or until its client
leaves (`patience.py`).

The page is static files (`page.py`). It talks to the endpoints and nothing else, and its content security policy lets
it load from its own origin alone.
"""
