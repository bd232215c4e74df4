"""Images: files to the pixels that a model wants. Pillow and nvJPEG stand side by side."""
