"""How the bundled model was made: data, augmentation, an optional teacher, training under random `r`, export."""
