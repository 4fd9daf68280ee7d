"""The student: a light decoder and learnable affinities on frozen CLIP features."""
