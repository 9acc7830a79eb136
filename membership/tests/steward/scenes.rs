//! Scenes that are played by hand.
