"""Messages between processes, and both ends of their connections. No HTTP and no torch.

An HTTP process connects to an engine through an unnamed socket pair (`door.py`), which outlives both. A frame is a
length and a MessagePack message (`frames.py`). `messages.py` defines every message, and its decoder checks the input.
An engine sends its catalog first. Calls carry an id and are answered in any order. A caller that gives up sends
`Withdraw`. A connection that breaks fails all its calls at once, and the engine withdraws the requests of a process
that is gone. Messages sent in one turn of an event loop leave in one write, and all messages that have arrived are
handled in one turn.

With several devices (`devices.py`) a request goes to the engine with the fewest calls of this process; among equals, to
the one that has waited longest for its turn. The requests of an engine that goes down go to another one, once. A
request that was in flight at two such ends is refused, because an image that ends processes would end them all.
"""
