"""What trains, and in which precision: parts, loading, quantization, adapters, freezing, hardware."""
