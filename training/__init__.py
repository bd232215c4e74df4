"""How the bundled model is made: data, augmentation, a teacher, training under random `r` on all GPUs, export."""
