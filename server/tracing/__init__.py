"""OpenTelemetry: the spans of a request, in the process that serves it and in the engine.

`start.py` reads the OTEL_* variables. If they ask for no traces, OpenTelemetry's SDK is not imported, and a request
costs one look at `context.py`, which also names the request in the log. Otherwise each process makes its own `Tracing`
(`provider.py`), never OpenTelemetry's global one, so that the traces of other packages stay out.

A request has a span of kind SERVER in the HTTP process (`server_span.py`), which continues its client's trace. Its
children are "reading", "decoding" for each image, and, in the engine process, "queue" and "answer"; `Request.trace`
names their parent. A batch serves several requests, so it has a trace of its own that links to each of them
(`engine_spans.py`). Children are made after they end, from times that are measured anyway.
"""
