"""What the studies are: networks, runs, and the arms of each study."""
