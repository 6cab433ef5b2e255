"""The integer program: which type and which device every group of tensors gets."""
