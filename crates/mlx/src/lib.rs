//! What mlx-rs lacks, made safe: collectives, quantization modes, memory limits. The only unsafe.
