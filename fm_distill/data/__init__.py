"""From disk to the devices: sources, images, order, feeding. Imports `config`, `system`."""
