"""Folders of photos without HTTP: `tome-server run` computes all of them, on one or several devices, into one table.

`files.py` lists what is to be computed. `computing.py` has one device and its model: files are read while the batches
before them are prepared and computed. Threads read and decode them (`reading.py`); where the device decodes, processes
read them (`reader.py` is what runs there, `reader_processes.py` asks them). `devices.py` has several devices, a process
each. Either gives the answers of a batch in the order in which batches came. `rows.py` makes rows of a table of them,
and `formats.py` writes rows as JSON Lines, CSV or Parquet.

Until the table is whole it lies in a folder beside it, in parts that are each a whole file (`unfinished.py`). A stop
loses at most the last part, and the same command computes the files that have no row yet.
"""
