"""What crosses between processes, and both ends of the way. It knows neither HTTP nor torch.

An HTTP process gets a connection to an engine through a pair of sockets without a name (`door.py`), which outlives
both. A frame is a length and a message in MessagePack (`frames.py`); `messages.py` has every message, and its decoder
checks what comes. An engine sends its catalog first. Calls carry an id and are answered in any order; a caller that
gives up sends `Withdraw`; a connection that breaks fails all its calls at once, and the engine withdraws the requests
of a process that is gone. What one turn of an event loop sends leaves in one write, and what has come is handled in one
turn.

With several devices (`devices.py`) each request goes to the engine that has the fewest calls of this process in hand,
of equals to the one that waited longest for its turn. What an engine held when it went down goes to another one, once;
a request that was in flight at two such ends is refused, since an image that ends processes would end them all.
"""
