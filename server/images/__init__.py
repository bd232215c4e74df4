"""Images: files to the pixels that a model wants. Pillow and nvJPEG stand side by side; both processes use this room.

`pillow.py` decodes any format under limits that are checked before anything is decoded; its result equals timm's own
preprocessing. Sixteen cores decode fewer photos than one GPU classifies, so on cuda the engine decodes JPEG itself: an
HTTP process reads the header in a few microseconds (`jpeg.py`) and passes the file on; what is unusual, or in doubt
(four colours, plain RGB, EXIF orientations, several pictures, cut-off files, more than 16 megapixels or 4 MiB), Pillow
looks at, as at every other format.

Before Pillow sees a file its header decides, by a list, whether the pixels will be right. `tiff.py` and `bmp.py` write
the directory or header again in a form that is known to be read right, or refuse the kind by its name; `png.py`,
`avif.py` and `segments.py` leave out metadata that could keep the pixels from being read, and `unended.py` puts the end
on a JPEG that lacks nothing else. docs/formats.md lists what is read.

Some small files take gigabytes or minutes to decode. `structure.py` reads the structure of a file, and `cost.py`
computes what decoding will take. `decoders.py` decodes plain photos in threads. All other files are decoded apart
(`apart.py`), in processes with limits of memory and time: `decoder_process.py` is the parent's side, `decoder.py`
runs in the process, and `turns.py` says whose turn it is.

On a GPU nvJPEG writes each file's planes, luminance and two colours, as they lie in the file (`nvjpeg_library.py`,
`nvjpeg_planes.py`), by orders from three threads. From its hardware decoder they are those of libjpeg, bit by bit.
Four kernel launches a batch (`resize_kernel.py`) then do what libjpeg and Pillow do after that: they interpolate the
colours, convert them, resize across and down with Pillow's whole-number weights, and crop, into the bytes that the
model's first product reads. So the pixels of a baseline JPEG are those of Pillow, byte for byte; of a progressive one,
which the hardware does not decode, they are a few levels off here and there. No call of torch is made for a single
image. A file that nvJPEG refuses, or of which the kernels do not know what libjpeg would make, is decoded by Pillow in
the same batch. On the CPU `resizing.py` does the same in PyTorch; it is what the kernels are held against.
"""
