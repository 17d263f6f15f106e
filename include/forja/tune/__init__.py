"""Tuning: what a served model bears, measured by a load generator, and the settings of Triton under which it bears most."""
