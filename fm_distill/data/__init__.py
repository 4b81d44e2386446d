"""From disk to the devices: sources read, images decode, order says which, feeding sends."""
