"""The live configuration: each model's deployment `r`, versioned, and where it is kept.

A change holds for the very next request on every HTTP process and every engine of a server: the engines share one file
(`local.py`), which is replaced as a whole; who needs the `r` looks whether it was replaced (one `stat`) and reads it
only then. A live `r` is stored with the start setting that it replaced, and outlives restarts while that setting stays
the same: who starts the server with another `--r` means that one.

Many servers share one configuration by Redis (`in_redis.py`: a change through any of them reaches all, is compared
with the version that it is made upon, and is refused while Redis is away; versions never go back) or by a file that
somebody else writes (`watched.py`). On Ray it is pushed (`pushed.py`). What is wrong for a model of this server is
refused whole.

Whatever becomes of a source, the last good configuration goes on (`last_good.py`): a copy in memory outlives the
engine, one in the state folder outlives the server. `tome_config_stale` is 1 meanwhile.
"""
