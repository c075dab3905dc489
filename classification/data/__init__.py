"""The pictures of a training: where they lie, how they are read and augmented, in which order, and the batches."""
