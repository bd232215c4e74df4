"""Image files to the pixels that a model wants. Pillow and nvJPEG work side by side; HTTP and engine processes use
both.

`pillow.py` decodes any format, under limits that are checked before decoding; its result equals timm's own
preprocessing. Sixteen cores decode fewer photos than one GPU classifies, so on cuda the engine decodes JPEG itself. An
HTTP process reads the header in a few microseconds (`jpeg.py`) and passes the file on. Pillow decodes all other
formats, and JPEGs that are unusual or in doubt: four colours, plain RGB, EXIF orientations, several pictures, cut-off
files, more than 16 megapixels or 4 MiB.

The header of a file decides, by a list, whether Pillow will give the right pixels. `tiff.py` and `bmp.py` rewrite the
directory or header in a form that Pillow reads correctly, or refuse the kind by its name. `png.py`, `avif.py` and
`segments.py` remove metadata that could prevent decoding, and `unended.py` adds a missing end to a JPEG.
docs/formats.md lists what is read.

Some small files take gigabytes or minutes to decode. `structure.py` reads the structure of a file, and `cost.py`
computes what decoding will take. `decoders.py` decodes plain photos in threads. All other files are decoded apart
(`apart.py`), in processes with limits of memory and time: `decoder_process.py` is the parent's side, `decoder.py` runs
in the process, and `turns.py` orders the tasks.

On a GPU nvJPEG writes each file's planes, luminance and two colours, as they are coded (`nvjpeg_library.py`,
`nvjpeg_planes.py`), called from three threads. From its hardware decoder they equal libjpeg's, bit by bit. Four kernel
launches a batch (`resize_kernel.py`) then do the rest of libjpeg's and Pillow's work: they interpolate and convert the
colours, resize across and down with Pillow's integer weights, and crop, into the input of the model's first product. So
the pixels of a baseline JPEG equal Pillow's, byte for byte. Those of a progressive one, which the hardware does not
decode, differ by a few levels in places. Torch is never called for a single image. Pillow decodes the files of the same
batch that nvJPEG refuses, or for which libjpeg's rules are not known. On the CPU `resizing.py` does the same in
PyTorch; it is the reference of the kernels.
"""
