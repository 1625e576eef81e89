"""Replays of request traces against routing policies: in virtual time, on Serve with modelled engines, and for real."""
