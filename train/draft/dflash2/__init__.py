"""The DFlash2 draft: DFlash with convolutions within a block, and a selector of a path through candidates."""
