"""One module per paper, named as the paper is, and what only methods share: distiller (synthesise, then distil),
generative, inversion.

Imports training, models, measures and what lies below them; a method never imports the front door or the book.
"""
