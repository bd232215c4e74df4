"""OpenTelemetry: the spans of a request, in the process that serves it and in the engine.

`start.py` reads the OTEL_* variables. Where they ask for nothing, nothing of OpenTelemetry's SDK is imported, and a
request costs a look at `context.py`, which names the request in the log too. Where they do, each process makes a
`Tracing` of its own (`provider.py`), never the global one of OpenTelemetry: what other packages trace does not get in.

A request has a span of kind SERVER in the HTTP process (`server_span.py`), which continues the trace of its client. Its
children are "reading", "decoding" for each image, and, in the engine process, "queue" and "answer"; `Request.trace`
names the parent there. A batch serves several requests, so it is a trace of its own, with a link to each of them
(`engine_spans.py`). Children are made when they have ended, from times that are measured anyway.
"""
