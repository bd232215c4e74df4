"""Folders of photos without HTTP: `tome-server run` computes all of them, on one or several devices, into one table.

`files.py` lists the files. `computing.py` has one device and its model; while it computes a batch, the next batches are
prepared and read. Threads read and decode the files (`reading.py`). If the device decodes, processes read the files:
`reader.py` runs in them, and `reader_processes.py` calls them. `devices.py` has several devices, a process for each.
Both return the batches' answers in order. `rows.py` turns answers into rows of a table, and `formats.py` writes rows as
JSON Lines, CSV or Parquet.

An unfinished table is a folder beside the output, with parts that are complete files (`unfinished.py`). A stop loses at
most the last part, and the same command then computes the files without a row.
"""
