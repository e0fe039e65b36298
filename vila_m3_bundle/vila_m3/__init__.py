"""The model that talks: VILA-M3's architecture, its processor, its training and its conversations."""
