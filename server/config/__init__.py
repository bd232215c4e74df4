"""The live configuration: each model's deployment `r`, versioned, and the stores that keep it.

A change applies to the very next request on every HTTP process and every engine of a server. The engines share one file
(`local.py`), which is replaced as a whole. A reader checks with one `stat` whether it was replaced, and reads it only
then. A live `r` is stored with the start setting that it replaced. It outlives restarts while that setting stays the
same; a start with another `--r` drops it.

Several servers share one configuration by Redis or by a file. With Redis (`in_redis.py`), a change through any server
reaches all. It is compared with the version that it is based on, and refused while Redis does not answer; versions
never decrease. A file (`watched.py`) is written by somebody else. On Ray the configuration is pushed (`pushed.py`). A
configuration that is wrong for a model of this server is refused as a whole.

If a source fails, the last good configuration stays in force (`last_good.py`): a copy in memory outlives the engine,
and one in the state folder outlives the server. `tome_config_stale` is 1 meanwhile.
"""
