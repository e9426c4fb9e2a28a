"""From noise to samples: time grids, guidance, samplers and pictures."""
