"""How good a network is, how varied images are, and how close they come to other images.

Imports training's modes, data, taps and what lies below them.
"""
