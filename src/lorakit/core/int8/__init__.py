"""A base whose linear layers multiply in int8 (W8A8): calibration, quantization and input scales."""
