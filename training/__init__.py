"""Makes the bundled model: data, augmentation, a teacher, training under random `r` on all GPUs, export."""
