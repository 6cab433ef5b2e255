"""The mixes of types that llama-quantize knows by name, such as Q4_K_M."""
