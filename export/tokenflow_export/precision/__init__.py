"""What fewer bits cost: precision search, 8-bit calibration, emulated half precision, drift by tensor."""
