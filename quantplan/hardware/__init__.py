"""The machines that plans are for: from text, from a profile, or the present one."""
