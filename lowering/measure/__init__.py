"""What is measured of a site's tokens, for calibration."""
